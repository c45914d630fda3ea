"""Checking images before training: damage is found whatever the header says, and no image is read twice."""

import io
import json
import os

import pytest
from PIL import Image

from dataset import pictures
from dataset.jsonl import BadRecord, DataError
from dataset.pictures import check_pictures, examine, picture_faults, refuse_faulty
from tests.conftest import write_jsonl


def picture(kind: str, number: int = 0) -> bytes:
    """A noisy image of 64 x 48 pixels, so that it does not compress to a few bytes."""
    made = io.BytesIO()
    Image.frombytes("RGB", (64, 48), bytes((k * 73 + number) % 251 for k in range(64 * 48 * 3))).save(made, kind)
    return made.getvalue()


def names_of(record: dict, ignored: dict[str, int]) -> list[str]:
    if "images" not in record:
        raise BadRecord("none")
    return record["images"]


@pytest.fixture
def images(tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    for number in range(4):
        (folder / f"{number}.jpg").write_bytes(picture("JPEG", number))
    return folder


@pytest.fixture
def lines(tmp_path):
    (tmp_path / "data").mkdir()
    records = [{"images": ["0.jpg", "1.jpg"]}, {"other": 1}, {"images": ["1.jpg", "2.jpg"]}, {"images": []}]
    return write_jsonl(tmp_path / "data" / "lines.jsonl", records)


@pytest.fixture
def check(lines, images):
    return lambda: check_pictures(lines, images, names_of)


@pytest.fixture
def read(monkeypatch):
    """The names of the images read from now on."""
    seen = []

    def counting(path):
        seen.append(path.name)
        return examine(path)

    monkeypatch.setattr(pictures, "examine", counting)
    return seen


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF"])
def test_one_that_is_cut_off_is_found_and_a_whole_one_is_not(tmp_path, kind):
    content = picture(kind)
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    whole.write_bytes(content)
    cut.write_bytes(content[: len(content) // 2])
    assert examine(whole).fault is None
    assert examine(cut).fault.startswith(("cannot be read as an image", "is not an image"))


def test_faults_in_their_order(images, tmp_path):
    (images / "text.jpg").write_text("not a picture")
    faults = picture_faults([images / "0.jpg", images / "text.jpg", images / "gone.jpg", images, images / "1.jpg"])
    assert faults == [
        None,
        "is not an image in a supported format that Pillow reads",
        "does not exist",
        "does not exist",
        None,
    ]


def test_one_that_the_system_does_not_give_is_told(images, monkeypatch):
    def refuse(self):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("pathlib.Path.read_bytes", refuse)
    assert examine(images / "0.jpg").fault == "cannot be read: Permission denied"


def test_the_pictures_of_all_good_lines_each_once(check, read):
    found = check()
    assert [*found] == ["0.jpg", "1.jpg", "2.jpg"]
    assert sorted(read) == ["0.jpg", "1.jpg", "2.jpg"]
    assert [seen.fault for seen in found.values()] == [None] * 3
    assert len({seen.sha256 for seen in found.values()}) == 3


def test_a_second_start_reads_no_picture_and_no_line(check, read, monkeypatch):
    first = check()
    read.clear()
    monkeypatch.setattr(pictures, "JsonlReader", None)
    assert check() == first
    assert read == []


def change_content(path):
    """Change the content but not the size, and reset the modification time."""
    before, content = path.stat(), bytearray(path.read_bytes())
    content[-50] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def cut_off(path):
    path.write_bytes(path.read_bytes()[:-200])


@pytest.mark.parametrize("change", [change_content, cut_off, os.unlink])
def test_one_that_has_changed_is_read_again_alone(check, read, images, change):
    before = check()
    read.clear()
    change(images / "1.jpg")
    after = check()
    assert read == ["1.jpg"]
    assert after["1.jpg"] != before["1.jpg"]
    assert (after["1.jpg"].fault is None) == (change is change_content)
    assert {name: seen for name, seen in after.items() if name != "1.jpg"} == {
        name: seen for name, seen in before.items() if name != "1.jpg"
    }


def test_more_lines_need_only_their_pictures(check, read, lines):
    check()
    read.clear()
    write_jsonl(lines, [{"images": ["0.jpg", "3.jpg"]}])
    assert [*check()] == ["0.jpg", "3.jpg"]
    assert read == ["3.jpg"]


def test_ctrl_c_loses_nothing_that_was_done(check, images, monkeypatch):
    monkeypatch.setattr(pictures, "AT_ONCE", 1)
    seen = []

    def interrupted(path):
        if len(seen) == 2:
            raise KeyboardInterrupt
        seen.append(path.name)
        return examine(path)

    monkeypatch.setattr(pictures, "examine", interrupted)
    with pytest.raises(KeyboardInterrupt):
        check()
    assert seen == ["0.jpg", "1.jpg"]
    rest = []
    monkeypatch.setattr(pictures, "examine", lambda path: rest.append(path.name) or examine(path))
    assert [found.fault for found in check().values()] == [None] * 3
    assert rest == ["2.jpg"]


@pytest.mark.parametrize("content", ["", "{", "[]", '{"state": 1, "pictures": {"0.jpg": [1]}}', '{"pictures": 3}'])
def test_a_damaged_record_is_made_again(check, read, lines, content):
    before = check()
    (record,) = (lines.parent / ".cache" / lines.name).glob("pictures-*.json")
    record.write_text(content)
    read.clear()
    assert check() == before
    assert len(read) == 3
    assert len(json.loads(record.read_text())["pictures"]) == 3


def test_where_the_record_cannot_be_written_they_are_read_each_time(check, read, monkeypatch, lines):
    def full(path):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pictures, "flush_to_disk", full)
    assert [*check()] == ["0.jpg", "1.jpg", "2.jpg"]
    assert [path.name for path in (lines.parent / ".cache" / lines.name).iterdir()] == []
    check()
    assert len(read) == 6


def test_names_that_are_no_utf_8_and_names_that_no_file_has(check, lines, images):
    name = os.fsdecode(b"caf\xe9.jpg")
    (images / name).write_bytes(picture("JPEG"))
    write_jsonl_ascii = [{"images": [name, "\ud83d.jpg", "nul\0.jpg", "A" * 5000]}]
    lines.write_text("".join(json.dumps(record) + "\n" for record in write_jsonl_ascii))
    for _ in range(2):
        found = check()
        assert found[name].fault is None
        assert {found[other].fault for other in ("\ud83d.jpg", "nul\0.jpg", "A" * 5000)} == {"does not exist"}


def test_a_faulty_picture_makes_a_bad_line(images):
    faults = {"gone.jpg": "does not exist", "bad.jpg": "cannot be read as an image: cut", "A" * 300: "does not exist"}
    refuse_faulty(["0.jpg"], images, faults)
    with pytest.raises(BadRecord) as told:
        refuse_faulty(["0.jpg", "bad.jpg"], images, faults)
    assert str(told.value) == f"the image {images / 'bad.jpg'} cannot be read as an image: cut"
    with pytest.raises(BadRecord, match=r"gone\.jpg does not exist \(--images_path names the folder\)"):
        refuse_faulty(["gone.jpg"], images, faults)
    with pytest.raises(BadRecord, match=r"A{200}… does"):
        refuse_faulty(["A" * 300], images, faults)


def test_a_data_file_that_is_missing_is_told(tmp_path, images):
    with pytest.raises(DataError, match="does not exist"):
        check_pictures(tmp_path / "gone.jsonl", images, names_of)
