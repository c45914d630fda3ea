"""The token cache: its content, what causes a rebuild, and that no crash, race or full disk leaves it wrong."""

import copy
import errno
import hashlib
import json
import multiprocessing
import os
import pickle
import signal
import time
import tracemalloc
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from dataset import token_cache
from dataset.cache_folder import fingerprint_file
from dataset.jsonl import DataError
from dataset.records import parse_text
from dataset.token_cache import open_token_cache, sha256_of
from model.chat import render_text
from tests.conftest import SENTENCES, write_jsonl
from tests.running import PATIENCE, from_process

resource = pytest.importorskip("resource", reason="Windows has none")

fork = multiprocessing.get_context("fork")  # a process of its own that need not import torch again


def real(tokenizer):
    return lambda texts: [(ids, None) for ids in render_text(tokenizer, texts)]


def must_not_run(*_):
    raise AssertionError("the file was read again")


@pytest.fixture
def data(tmp_path):
    """A data file in its own folder."""
    (tmp_path / "data").mkdir()
    return write_jsonl(tmp_path / "data" / "texts.jsonl", [{"text": f"{n} {SENTENCES[n % 8]}"} for n in range(30)])


@pytest.fixture
def open_it(data, tiny_tokenizer):
    """Open the cache of `data`, with some arguments replaced."""

    def open_cache(
        path=data, tokenizer=tiny_tokenizer, kind="text", parse=parse_text, encode=None, skip_bad_lines=False
    ):
        return open_token_cache(path, tokenizer, kind, parse, encode or real(tokenizer), skip_bad_lines)

    return open_cache


def caches(data: Path) -> list[str]:
    """The names in a data file's cache folder, except those of locks."""
    root = data.parent / ".cache" / data.name
    return sorted(path.name for path in root.iterdir() if path.name not in ("lock", "in_use"))


def samples_in(cache) -> list[list[int]]:
    return [cache.ids(n, 0, length).tolist() for n, length in enumerate(cache.lengths)]


def test_samples_come_back_whole_and_in_part(open_it, tiny_tokenizer):
    cache = open_it()
    expected = render_text(tiny_tokenizer, [f"{n} {SENTENCES[n % 8]}" for n in range(30)])

    assert len(cache) == 30
    assert samples_in(cache) == expected
    assert cache.ids(3, 2, 4).tolist() == expected[3][2:6]
    assert cache.targets(3, 2, 4).tolist() == [True] * 4
    assert cache.first_target.tolist() == [1] * 30
    assert (cache.bad_lines, cache.bad_reports, cache.ignored, cache.note(0)) == (0, [], {}, None)


@pytest.mark.parametrize("vocabulary", [600, 70_000])
def test_masks_and_large_ids_of_any_length_come_back(data, vocabulary):
    rng = np.random.default_rng(0)
    ids = [rng.integers(0, vocabulary, n).tolist() for n in [1, 2, 7, 8, 9, *rng.integers(1, 40, 55)]]
    masks = [(rng.random(len(sample)) < 0.4).tolist() for sample in ids]
    given = iter(zip(ids, masks, strict=True))

    class Tokenizer:
        bos_token_id, eos_token_id, chat_template = 1, 2, None
        backend_tokenizer = type("", (), {"to_str": lambda self: '{"added_tokens": [], "normalizer": 0, '
                                                                 '"pre_tokenizer": 0, "model": 0}'})()  # fmt: skip

        def __len__(self):
            return vocabulary

    # two samples per line, as for preference pairs, in several batches
    cache = open_token_cache(
        data, Tokenizer(), "pairs", parse_text, lambda texts: [next(given) for _ in (*texts, *texts)]
    )

    assert samples_in(cache) == ids
    for n, mask in enumerate(masks):
        assert cache.targets(n, 0, len(mask)).tolist() == mask
        assert all(cache.targets(n, k, len(mask) - k).tolist() == mask[k:] for k in range(len(mask)))
        later = [k for k, targets in enumerate(mask) if targets and k]
        assert cache.first_target[n] == (later[0] if later else len(mask))


def test_lines_may_give_any_number_of_samples_even_none(data, open_it):
    assert len(open_it(encode=lambda texts: [([1, 5, 2], None)])) == 1
    with pytest.raises(DataError, match="no valid line"):
        open_it(kind="nothing", encode=lambda texts: [])


def test_a_second_start_reads_no_line(open_it):
    first = open_it()
    second = open_it(parse=must_not_run, encode=must_not_run)

    assert second.folder == first.folder
    assert samples_in(second) == samples_in(first)


def test_a_cache_pickles_as_its_folder(open_it):
    cache = open_it()
    assert samples_in(pickle.loads(pickle.dumps(cache))) == samples_in(cache)
    assert len(pickle.dumps(cache)) < 500


def rewrite_longer(data):
    with open(data, "a") as file:
        file.write('{"text": "one more"}\n')


def rewrite_same_size(data):
    times = data.stat()
    data.write_bytes(data.read_bytes().replace(b"robot", b"ROBOT"))
    os.utime(data, ns=(times.st_atime_ns, times.st_mtime_ns))


@pytest.mark.parametrize("change", [rewrite_longer, rewrite_same_size, lambda data: os.utime(data, (1, 1))])
def test_another_size_time_or_content_is_read_anew_and_the_old_cache_goes(data, open_it, tiny_tokenizer, change):
    open_it()
    before = caches(data)
    change(data)

    texts = [json.loads(line)["text"] for line in data.read_text().splitlines()]
    assert samples_in(open_it()) == render_text(tiny_tokenizer, texts)
    assert len(caches(data)) == 1
    assert caches(data) != before


def test_the_hash_is_that_of_all_bytes_whatever_becomes_of_the_lines(data, open_it):
    data.write_bytes(b"\xef\xbb\xbf" + data.read_bytes().replace(b"\n", b"\r\n") + b"{\n\n \n")
    cache = open_it(skip_bad_lines=True)
    assert cache.data_sha256 == hashlib.sha256(data.read_bytes()).hexdigest()
    assert cache.bad_lines == 1


@pytest.fixture
def large(data):
    """A file of 4 MB lines: most of it lies between the sampled blocks."""
    return write_jsonl(data, [{"text": f"{n:06} " + "x" * 993} for n in range(4000)])


def few(texts):
    return [([1, 5, 2], None) for _ in texts]


def between_blocks(path, new=b"Y"):
    """Edit one byte outside the sampled blocks, and reset the modification time."""
    before = path.stat()
    with open(path, "r+b") as file:
        file.seek(150_000)
        file.write(new)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def test_an_edit_that_no_sample_shows_is_read_anew(large, open_it, capsys):
    first = open_it(encode=few).data_sha256
    state = fingerprint_file(large)
    between_blocks(large)
    assert fingerprint_file(large) == state
    second = open_it(encode=few)
    assert second.data_sha256 == hashlib.sha256(large.read_bytes()).hexdigest() != first
    assert "was edited without changing its size and time" in capsys.readouterr().err
    assert len(caches(large)) == 1


def test_an_edit_that_no_sample_shows_is_told_while_a_run_uses_the_cache(large, open_it):
    used = open_it(encode=few)
    between_blocks(large)
    with pytest.raises(DataError, match="cannot be read, and cannot be replaced while in use"):
        open_it(encode=few)
    assert len(used) == 4000


def test_a_file_that_was_only_linked_is_hashed_once_and_not_tokenised(data, open_it, monkeypatch):
    first = open_it()
    os.link(data, data.with_name("link.jsonl"))  # its change time differs now
    hashed = []
    monkeypatch.setattr(token_cache, "sha256_of", lambda path: hashed.append(path) or sha256_of(path))
    assert open_it(parse=must_not_run).data_sha256 == first.data_sha256
    assert open_it(parse=must_not_run).data_sha256 == first.data_sha256
    assert hashed == [data]
    assert sorted(path.name for path in first.folder.iterdir() if path.name.startswith(".")) == []


def test_where_nothing_can_be_written_a_linked_file_is_hashed_at_every_start(data, open_it, monkeypatch):
    first = open_it()
    os.link(data, data.with_name("link.jsonl"))
    hashed = []
    monkeypatch.setattr(token_cache, "sha256_of", lambda path: hashed.append(path) or sha256_of(path))

    def refuse(content, path):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(token_cache, "_write_json", refuse)
    for _ in range(2):
        assert open_it(parse=must_not_run).data_sha256 == first.data_sha256
    assert hashed == [data, data]


def test_a_cache_of_other_data_in_its_place_is_not_what_a_worker_opens(data, open_it):
    cache = open_it()
    pickled, folder = pickle.dumps(cache), cache.folder
    info = json.loads((folder / "info.json").read_text())
    (folder / "info.json").write_text(json.dumps(info | {"data_sha256": "0" * 64}))
    with pytest.raises(ValueError, match="was rebuilt from other data"):
        pickle.loads(pickled)


@pytest.mark.parametrize("name", ["tokens", "mask", "offsets", "first_target", "notes", "note_offsets"])
@pytest.mark.parametrize("change", [lambda path: path.write_bytes(path.read_bytes()[:-1]), os.unlink])
def test_a_damaged_cache_is_made_again(open_it, capsys, name, change):
    def noted(texts):
        return [([1, 5, 2], [False, True, True], {"length": len(text)}) for text in texts]

    cache = open_it(encode=noted)
    before = [(samples_in(cache)[n], cache.targets(n, 0, 3).tolist(), cache.note(n)) for n in range(len(cache))]
    path = cache.folder / f"{name}.bin"
    del cache
    change(path)
    cache = open_it(encode=noted)
    assert [(samples_in(cache)[n], cache.targets(n, 0, 3).tolist(), cache.note(n)) for n in range(len(cache))] == before
    (line,) = capsys.readouterr().err.splitlines()
    assert f"{name}.bin" in line
    assert "rebuilding it" in line


@pytest.mark.parametrize("content", ["", "{", "{}", '{"data_sha256": 1}'])
@pytest.mark.parametrize("name", ["info", "fingerprint"])
def test_a_damaged_json_in_it_too(open_it, tiny_tokenizer, name, content):
    path = open_it().folder / f"{name}.json"
    path.write_text(content)
    assert samples_in(open_it()) == render_text(tiny_tokenizer, [f"{n} {SENTENCES[n % 8]}" for n in range(30)])


def test_a_name_that_is_not_utf_8_and_a_bad_line_with_half_a_character(data, open_it):
    path = data.with_name(os.fsdecode(b"caf\xe9.jsonl"))
    path.write_bytes(data.read_bytes() + b'{"text": "\\ud83d"}\n\xff\n')
    cache = open_it(path, skip_bad_lines=True)
    assert cache.bad_lines == 2
    assert samples_in(open_it(path, parse=must_not_run, skip_bad_lines=True)) == samples_in(cache)
    with pytest.raises(DataError, match=r"line 31: .*half a character"):
        open_it(path)


def test_another_tokenizer_or_kind_has_a_cache_beside_the_first(data, open_it, tiny_tokenizer, plain_tokenizer):
    folders = {open_it().folder, open_it(tokenizer=plain_tokenizer).folder, open_it(kind="chat").folder}

    assert len(folders) == 3
    assert open_it(parse=must_not_run).folder in folders
    assert samples_in(open_it(tokenizer=plain_tokenizer)) != samples_in(open_it())


def test_the_same_entries_with_another_end_token_have_a_cache_of_their_own(open_it, tiny_tokenizer):
    other = copy.deepcopy(tiny_tokenizer)
    other.eos_token = other.unk_token
    first, second = open_it(), open_it(tokenizer=other)
    assert samples_in(first) != samples_in(second) == render_text(other, [f"{n} {SENTENCES[n % 8]}" for n in range(30)])


def test_another_file_beside_it_keeps_its_own_cache(data, open_it):
    other = write_jsonl(data.with_name("texts.jsonl.jsonl"), [{"text": "other"}])
    open_it(other)
    open_it()
    rewrite_longer(data)
    open_it()

    open_it(other, parse=must_not_run)


def test_an_old_cache_stays_while_a_run_uses_it(data, open_it):
    held = open_it()
    before = samples_in(held)
    rewrite_longer(data)
    open_it()

    assert len(caches(data)) == 2
    assert samples_in(pickle.loads(pickle.dumps(held))) == before  # opened as by a worker that starts now
    del held
    rewrite_longer(data)
    open_it()
    assert len(caches(data)) == 1


def test_two_processes_that_start_together_tokenise_once(data, open_it, tiny_tokenizer, tmp_path):
    log, building = tmp_path / "log", fork.Event()

    def start(second: bool, replies):
        if second:
            building.wait(PATIENCE)

        def encode(texts):
            building.set()
            time.sleep(0.3)  # time for the other to arrive; the outcome must not depend on it
            with open(log, "a") as file:
                file.write(f"{os.getpid()}\n")
            return real(tiny_tokenizer)(texts)

        replies.put(samples_in(open_it(encode=encode)))

    replies = fork.Queue()
    processes = [fork.Process(target=start, args=(second, replies), daemon=True) for second in (False, True)]
    for process in processes:
        process.start()
    got = [from_process(replies, *processes) for _ in processes]
    for process in processes:
        process.join(PATIENCE)
        assert process.exitcode == 0

    assert got[0] == got[1] == samples_in(open_it(parse=must_not_run))
    assert log.read_text() == f"{processes[0].pid}\n"


def test_a_crash_in_the_middle_leaves_nothing_wrong(data, open_it, tiny_tokenizer):
    def encode_and_die(texts):
        os.kill(os.getpid(), signal.SIGKILL)

    process = fork.Process(target=partial(open_it, encode=encode_and_die))
    process.start()
    process.join(PATIENCE)
    assert process.exitcode == -signal.SIGKILL
    (left,) = caches(data)
    assert left.startswith("partial-")

    texts = [json.loads(line)["text"] for line in data.read_text().splitlines()]
    assert samples_in(open_it()) == render_text(tiny_tokenizer, texts)
    assert len(caches(data)) == 1
    assert left not in caches(data)


@pytest.mark.parametrize("error", [KeyboardInterrupt(), DataError("some fault")])
def test_an_error_in_the_middle_leaves_nothing(data, open_it, error):
    def encode(texts):
        raise error

    with pytest.raises(type(error)):
        open_it(encode=encode)
    assert caches(data) == []


def test_a_file_that_changes_while_it_is_read_is_told(data, open_it, tiny_tokenizer):
    def encode(texts):
        rewrite_longer(data)
        return real(tiny_tokenizer)(texts)

    with pytest.raises(DataError, match=r"texts\.jsonl changed while it was being read: run again"):
        open_it(encode=encode)
    assert caches(data) == []


def test_a_read_only_data_folder_has_its_cache_in_the_home(data, open_it, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    data.parent.chmod(0o555)
    cache = open_it()

    assert [path.name for path in data.parent.iterdir()] == ["texts.jsonl"]
    assert cache.folder.is_relative_to(tmp_path / "home" / "minimind")
    assert samples_in(open_it(parse=must_not_run)) == samples_in(cache)

    # a file of the same name in another folder differs
    (tmp_path / "other").mkdir()
    other = write_jsonl(tmp_path / "other" / "texts.jsonl", [{"text": "other"}])
    other.parent.chmod(0o555)
    assert len(open_it(other)) == 1
    assert open_it(parse=must_not_run).folder == cache.folder


def test_nowhere_to_write_is_told_with_both_places(data, open_it, tmp_path, monkeypatch):
    (tmp_path / "home").write_text("a file")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    data.parent.chmod(0o555)

    with pytest.raises(DataError) as error:
        open_it()
    assert str(data.parent / ".cache") in str(error.value)
    assert str(tmp_path / "home" / "minimind") in str(error.value)


def test_a_full_disk_is_one_clear_line_and_leaves_nothing(data, open_it):
    write_jsonl(data, [{"text": SENTENCES[0] * 20}] * 200)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))  # no file may grow beyond this: a write really fails
    try:
        with pytest.raises(DataError) as error:
            open_it()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    assert str(error.value).startswith(f"the cache of {data} cannot be written in {data.parent / '.cache'}")
    assert str(error.value).endswith("File too large; free some space there")
    assert caches(data) == []
    assert len(open_it()) == 200


def test_bad_lines_stop_the_run_or_are_counted_with_one_cache_for_both(data, open_it):
    lines = data.read_text().splitlines()
    data.write_text("\n".join([*lines[:5], "{", *lines[5:], '{"text": 3}']))

    with pytest.raises(DataError, match=r"texts\.jsonl, line 6: not valid JSON"):
        open_it()
    assert caches(data) == []

    cache = open_it(skip_bad_lines=True)
    assert (len(cache), cache.bad_lines) == (30, 2)
    assert cache.bad_reports[0].startswith("line 6: not valid JSON")
    with pytest.raises(DataError, match=r"texts\.jsonl, line 6: not valid JSON"):
        open_it(parse=must_not_run)
    assert open_it(skip_bad_lines=True, parse=must_not_run).bad_lines == 2


@pytest.mark.parametrize(
    ("content", "skip", "reason"),
    [
        ("\n \n", False, "has no valid line; all are blank"),
        ("{\n[]\n", True, "has no valid line; 2 bad, the first: line 1: not valid JSON"),
    ],
)
def test_a_file_without_a_good_line_is_told(data, open_it, content, skip, reason):
    data.write_text(content)
    with pytest.raises(DataError, match=reason):
        open_it(skip_bad_lines=skip)
    assert caches(data) == []


def test_memory_does_not_grow_with_the_file(data, open_it):
    line = json.dumps({"text": "x" * 49_980}) + "\n"
    data.write_text(line * 1000)
    tracemalloc.start()

    cache = open_it(encode=lambda texts: [(np.ones(10_000, np.int64), None) for _ in texts])
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()

    assert cache.lengths.sum() == 10_000_000
    assert peak < 15_000_000  # for 50 MB of text and 80 MB of tokens
