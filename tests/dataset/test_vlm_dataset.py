"""Rows from lines with images: image tokens, labels, order of images, and what is refused and dropped."""

import json
import os
import pickle
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from dataset import DataError, StepLoader, VLMDataset, collate
from dataset.cache_folder import in_use
from dataset.feature_cache import open_feature_cache
from model.images import image_processor, image_token_id
from model.model_vlm import MiniMindVLM, VLMConfig
from tests.conftest import write_jsonl

COLOURS = {"red.png": (255, 0, 0), "blue.jpg": (0, 0, 255), "grey.png": (128, 128, 128)}
TOKENS = 4  # tokens per image


def line(question: str, answer: str, image=None) -> dict:
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {"conversations": turns} | ({} if image is None else {"image": image})


@pytest.fixture(scope="module")
def images_path(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    for name, colour in COLOURS.items():
        Image.new("RGB", (40, 32), colour).save(folder / name)
    return folder


@pytest.fixture
def open_lines(tmp_path, images_path, clip_dir, tiny_tokenizer):
    """Write lines (None: use the file as it is) and open them; further arguments go to VLMDataset."""

    def open_them(lines: list[dict] | None, tokenizer=tiny_tokenizer, images=images_path, **given) -> VLMDataset:
        path = tmp_path / "lines.jsonl"
        if lines is not None:
            write_jsonl(path, lines)
        processor = image_processor(clip_dir, 32)
        return VLMDataset(path, tokenizer, images_path=images, image_tokens=TOKENS, processor=processor, **given)

    return open_them


def make_pieces(row: dict, tokenizer) -> list[str]:
    """The row as text, with each image's tokens as one '#' and targets in brackets."""
    text, image_left = [], 0
    for token, is_image, label in zip(row["input_ids"], row["image_mask"], row["labels"], strict=True):
        if is_image:
            assert token == image_token_id(tokenizer)
            assert label == -100
            image_left = image_left or TOKENS
            image_left -= 1
            text += ["#"] if image_left == TOKENS - 1 else []
        else:
            assert image_left == 0, "a run of image places is broken"
            piece = tokenizer.decode([token])
            text.append(f"[{piece}]" if label == token else piece)
            assert label in (token, -100)
    return text


def written(row: dict, tokenizer) -> str:
    text = "".join(make_pieces(row, tokenizer)).replace("][", "")
    return text.split("</s>\n", 1)[1]  # without the default system turn


def main_colour(pixels: torch.Tensor) -> str:
    """The file that these pixels came from."""
    processor = {"mean": (0.48145466, 0.4578275, 0.40821073), "std": (0.26862954, 0.26130258, 0.27577711)}
    rgb = (pixels.mean((1, 2)) * torch.tensor(processor["std"]) + torch.tensor(processor["mean"])) * 255
    return min(COLOURS, key=lambda name: float((rgb - torch.tensor(COLOURS[name])).abs().sum()))


class TestRows:
    @pytest.mark.parametrize("name", ["tiny_tokenizer", "plain_tokenizer"])
    @pytest.mark.parametrize(
        ("image", "question", "shown", "files"),
        [
            (None, "Hi <image>", "Hi <image>", []),
            ("", "Hi", "Hi", []),
            ("red.png", "<image>\nWhat?", "#\nWhat?", ["red.png"]),
            ("red.png", "What?\n<image>", "What?\n#", ["red.png"]),
            ("red.png, blue.jpg", "<image>\n<image>\nSame?", "#\n#\nSame?", ["red.png", "blue.jpg"]),
            (["blue.jpg", "red.png"], "<image><image>", "##", ["blue.jpg", "red.png"]),
            (["grey.png"], "<image> is not <image>", "# is not <image>", ["grey.png"]),
            (["red.png"], "@@@@ <image> @", "@@@@ # @", ["red.png"]),
        ],
    )
    def test_markers_become_places_in_order(self, request, open_lines, name, image, question, shown, files):
        tokenizer = request.getfixturevalue(name)
        row = open_lines([line(question, "Yes.", image)], tokenizer, packing=False)[0]
        assert written(row, tokenizer) == f"<s>user\n{shown}</s>\n<s>assistant\n[Yes.</s>]\n"
        assert [main_colour(pixels) for pixels in row["pixel_values"]] == files

    def test_images_are_spread_over_the_turns(self, open_lines, tiny_tokenizer):
        chat = ["<image>\none", "1", "two <image>", "2 <image> <think>", "three", "3"]
        turns = [{"content": text} for text in chat]
        row = open_lines([{"image": "red.png,blue.jpg", "conversations": turns}], packing=False)[0]
        assert written(row, tiny_tokenizer) == (
            "<s>user\n#\none</s>\n<s>assistant\n[1</s>]\n<s>user\ntwo #</s>\n"
            "<s>assistant\n[2 <image> <think></s>]\n<s>user\nthree</s>\n<s>assistant\n[3</s>]\n"
        )
        assert [main_colour(pixels) for pixels in row["pixel_values"]] == ["red.png", "blue.jpg"]

    def test_system_thought_and_weight_are_used_as_in_every_stage(self, open_lines, tiny_tokenizer):
        turns = [
            {"role": "user", "content": "<image>"},
            {"role": "assistant", "content": "1", "weight": 0},
            {"role": "user", "content": "And?"},
            {"role": "assistant", "reasoning_content": "Red.", "content": "2", "train": True},
        ]
        dataset = open_lines([{"id": 1, "system": "s", "image": "red.png", "conversations": turns}], packing=False)
        assert "".join(make_pieces(dataset[0], tiny_tokenizer)).replace("][", "") == (
            "<s>system\ns</s>\n<s>user\n#</s>\n<s>assistant\n1</s>\n<s>user\nAnd?</s>\n"
            "<s>assistant\n[<think>\nRed.\n</think>\n<answer>\n2\n</answer></s>]\n"
        )
        assert dataset.summary.endswith(", ignored keys: id 1")

    def test_an_image_in_an_answer_is_seen_and_its_places_are_not_learned(self, open_lines, tiny_tokenizer):
        row = open_lines([line("Draw.", "Here: <image> red", "red.png")], packing=False)[0]
        assert written(row, tiny_tokenizer) == "<s>user\nDraw.</s>\n<s>assistant\n[Here: ]#[ red</s>]\n"
        assert int(row["image_mask"].sum()) == TOKENS
        assert (row["labels"][row["image_mask"]] == -100).all()

    def test_a_row_has_room_for_three_images_of_a_vit_b_unless_told_otherwise(self, open_lines):
        assert open_lines([line("Hi", "Yes.")]).max_seq_len == 640
        assert open_lines([line("Hi", "Yes.")], max_seq_len=99).max_seq_len == 99

    def test_grey_palette_transparent_and_cmyk_files(self, open_lines, tmp_path):
        folder = tmp_path / "modes"
        folder.mkdir()
        names = []
        for mode in ("L", "P", "RGBA", "CMYK"):
            names.append(f"{mode}.{'jpg' if mode == 'CMYK' else 'png'}")
            Image.new("RGB", (32, 32), (128, 128, 128)).convert(mode).save(folder / names[-1])
        row = open_lines([line("<image>" * 4, "Grey.", names)], images=folder)[0]
        assert [main_colour(pixels) for pixels in row["pixel_values"]] == ["grey.png"] * 4


class TestBatches:
    LINES = (
        line("<image>\nWhat is it?", "Red.", "red.png"),
        line("Who are you?", "MiniMind."),
        line("<image>\n<image>\nAre they the same?", "No, not at all.", "red.png,blue.jpg"),
        line("<image>\nAnd this?", "Grey.", "grey.png"),
    )

    @pytest.mark.parametrize("packing", [True, False])
    def test_text_one_image_and_many_share_a_batch(self, open_lines, clip_dir, packing):
        """Each sample gets the logits it gets alone, and cached features give the same logits as pixels."""
        dataset = open_lines([*self.LINES], packing=packing, max_seq_len=240)
        alone = open_lines([*self.LINES], packing=False)
        torch.manual_seed(0)
        config = VLMConfig(dim=32, n_layers=2, n_heads=4, n_kv_heads=2, vocab_size=700)
        config.image_token_id = int(alone[0]["input_ids"][alone[0]["image_mask"]][0])
        model = MiniMindVLM(config, vision_model=clip_dir).eval()
        assert len(dataset) == (2 if packing else 4)

        def logits_of(batch: dict) -> torch.Tensor:
            labels = batch.pop("labels")
            with torch.no_grad():
                logits = model(**batch).logits
            return torch.cat([logits[:, :-1][labels[:, 1:] == token] for token in labels.unique()[1:]])

        expected = [logits_of(collate([row])) for row in alone]
        by_pixels = logits_of(collate([*dataset]))
        assert sorted(map(sum, by_pixels.tolist())) == pytest.approx(
            sorted(map(sum, torch.cat(expected).tolist())), abs=1e-3
        )

        dataset.features = open_feature_cache(
            dataset.image_hashes(), dataset.images_path, dataset.load_pixels, model.encode_images, "test"
        )
        batch = collate([*dataset])
        assert "pixel_values" not in batch
        assert batch["image_features"].shape == (4, TOKENS, 16)
        torch.testing.assert_close(logits_of(batch), by_pixels, atol=2e-3, rtol=1e-2)  # they are kept in fp16
        assert dataset.empty_row["image_features"].shape == (0, TOKENS, 16)

    def test_ranks_without_an_image_still_have_an_empty_batch_of_them(self, open_lines):
        dataset = open_lines([self.LINES[1]] * 3, packing=False)
        steps = [
            batches
            for rank in (0, 1)
            for batches in StepLoader(dataset, 2, 1, 1, seed=0, rank=rank, world_size=2).steps()
        ]
        assert [batch["pixel_values"].shape for (batch,) in steps] == [(0, 3, 32, 32)] * 2
        assert [int(batch["attention_mask"].any(1).sum()) for (batch,) in steps] == [2, 1]


class TestRefused:
    @pytest.mark.parametrize(
        ("record", "reason"),
        [
            (line("no marker", "Red.", "red.png"), "1 images, but only 0 <image> markers"),
            (line("<image> one", "Red.", "red.png,blue.jpg"), "2 images, but only 1 <image> markers"),
            (line("<image>", "Red.", "gone.png"), r"gone\.png does not exist"),
            (line("<image>", "Red.", "A" * 5000), "AAA… does not exist"),  # such as an image's bytes, not its name
            (line("<image>", "Red.", 7), '"image" must be a name'),
            (line("<image>", "Red.", ["red.png", None]), '"image" must be a name'),
            (line("<image>", "Red.", "red.png,"), '"image" must be a name'),
            (line("<image>", "Red.", {"file": "red.png"}), '"image" must be a name'),
            ({"image": "red.png"}, '"conversations" is missing'),
        ],
    )
    def test_a_bad_line_is_named(self, open_lines, record, reason):
        good = line("<image>", "Red.", "red.png")
        with pytest.raises(DataError, match=f"line 2: .*{reason}"):
            open_lines([good, record])
        dataset = open_lines([good, record], skip_bad_lines=True)
        assert len(dataset) == 1
        assert "1 bad lines skipped, the first: line 2" in dataset.summary

    @pytest.mark.parametrize("name", ["late.png", "below/late.png"])
    def test_a_line_left_out_for_want_of_its_image_is_read_once_that_is_there(self, open_lines, tmp_path, name):
        images = tmp_path / "images"
        (images / "below").mkdir(parents=True)
        lines = [line("<image>", "Late.", name), line("Hi", "Hello.")]
        assert len(open_lines(lines, images=images, skip_bad_lines=True, packing=False)) == 1
        Image.new("RGB", (40, 32)).save(images / name)
        assert len(open_lines(None, images=images, skip_bad_lines=True, packing=False)) == 2

    def test_a_sample_that_would_lose_part_of_an_image_is_dropped_and_counted(self, open_lines, tiny_tokenizer):
        short = line("<image>", "Red.", "red.png")
        late = {"image": "red.png", "conversations": [{"content": c} for c in ("Hi", "Hi", "and <image>?", "Red.")]}
        whole = open_lines([late], packing=False)[0]
        end = int(whole["image_mask"].nonzero()[-1]) + 1
        fits = open_lines([late, short], packing=False, max_seq_len=end)
        assert "dropped" not in fits.summary  # its last answer is cut off, its first is a target
        assert fits[0]["image_mask"].sum() == TOKENS
        cut = open_lines([late, short], packing=False, max_seq_len=end - 1)
        assert len(cut) == 1
        assert f"1 dropped because an image does not fit in {end - 1} tokens" in cut.summary
        with pytest.raises(DataError, match="no sample has a target"):
            open_lines([late], packing=False, max_seq_len=end - 1)

    @pytest.mark.parametrize("num_workers", [0, 1])
    def test_an_image_that_breaks_after_it_was_checked_is_named(self, open_lines, images_path, tmp_path, num_workers):
        folder = tmp_path / "broken"
        folder.mkdir()
        shutil.copy(images_path / "red.png", folder / "bad.png")
        dataset = open_lines([line("<image>", "Red.", "bad.png")], images=folder)
        (folder / "bad.png").write_bytes((images_path / "red.png").read_bytes()[:60])
        with pytest.raises(DataError, match=r"bad\.png cannot be read as an image") as error:
            list(StepLoader(dataset, 1, 1, 1, seed=0, num_workers=num_workers).steps())
        assert "\n" not in str(error.value)
        with pytest.raises(DataError, match=r"bad\.png cannot be read as an image"):
            open_feature_cache(
                dataset.image_hashes(), folder, dataset.load_pixels, lambda x: x, "broken", num_workers=num_workers
            )
        assert not list((tmp_path / ".cache").glob("*/features-broken-*"))


class TestImagesThatBreakAndAreMended:
    """Three lines, of which the second has an image that is damaged at first."""

    LINES = (line("<image>", "Red.", "red.png"), line("<image>", "Blue.", "blue.jpg"), line("Hi", "Hello."))

    @pytest.fixture
    def images(self, images_path, tmp_path):
        folder = shutil.copytree(images_path, tmp_path / "images")
        blue = folder / "blue.jpg"
        blue.write_bytes(blue.read_bytes()[:-100])
        return folder

    @pytest.fixture
    def open_three(self, open_lines, images):
        return lambda **given: open_lines([*self.LINES], images=images, packing=False, **given)

    def test_it_is_a_bad_line_named_before_training_or_skipped_and_counted(self, open_three, images):
        with pytest.raises(DataError, match=rf"line 2: the image {images}/blue\.jpg cannot be read as an image: ."):
            open_three()
        dataset = open_three(skip_bad_lines=True)
        assert len(dataset) == 2
        assert "1 bad lines skipped, the first: line 2: the image" in dataset.summary

    def test_mended_it_is_read_and_named_as_what_has_changed(self, open_three, images, images_path):
        before = open_three(skip_bad_lines=True)
        assert before.changed_since(json.loads(json.dumps(before.identity))) is None
        shutil.copy(images_path / "blue.jpg", images)
        mended = open_three()
        assert len(mended) == 3
        change = mended.changed_since(before.identity)
        assert change == (
            f"the image {images / 'blue.jpg'} is valid now, but the saved run began without its lines: "
            "move it away to continue without them"
        )
        (images / "blue.jpg").unlink()  # as the error line says
        assert open_three(skip_bad_lines=True).changed_since(before.identity) is None

    def test_broken_again_it_is_named(self, open_three, images, images_path):
        broken = (images / "blue.jpg").read_bytes()
        shutil.copy(images_path / "blue.jpg", images)
        before = open_three().identity
        (images / "blue.jpg").write_bytes(broken)
        change = open_three(skip_bad_lines=True).changed_since(before)
        assert change == f"the image {images / 'blue.jpg'} was valid when the saved run began: repair it"

    def test_the_bytes_count_not_the_place_or_the_time(self, open_lines, images_path, tmp_path):
        before = open_lines([*self.LINES], packing=False).identity
        copied = shutil.copytree(images_path, tmp_path / "copied")
        os.utime(copied / "red.png", (1, 1))
        dataset = open_lines(None, images=copied, packing=False)
        assert dataset.identity == before
        Image.new("RGB", (40, 32), (250, 0, 0)).save(copied / "red.png")
        other = open_lines(None, images=copied, packing=False)
        assert other.changed_since(before) == f"the images in {copied} have changed since the saved run began"

    def test_an_edited_line_comes_before_all_else(self, open_lines):
        before = open_lines([*self.LINES], packing=False).identity
        other = open_lines([self.LINES[0]], packing=False)
        assert "lines.jsonl has changed since" in other.changed_since(before)

    def test_what_was_saved_by_an_earlier_version_is_gone_on_with(self, open_three):
        assert open_three(skip_bad_lines=True).changed_since({}) is None


def test_another_tower_s_places_are_not_those_of_the_first(images_path, clip_dir, tiny_tokenizer, tmp_path):
    path = write_jsonl(tmp_path / "lines.jsonl", [line("<image>", "Red.", "red.png")])
    for image_tokens in (4, 9):
        given = {"images_path": images_path, "image_tokens": image_tokens, "processor": image_processor(clip_dir, 32)}
        assert int(VLMDataset(path, tiny_tokenizer, **given)[0]["image_mask"].sum()) == image_tokens


def test_features_are_computed_once_and_anew_for_a_changed_image(tmp_path, clip_dir):
    folder = tmp_path / "images"
    folder.mkdir()
    for name in ("a.png", "b.png"):
        Image.new("L", (4, 4), 100).save(folder / name)
    encoded = []

    def load(name):
        return torch.full((1, 3, 4, 4), float(np.asarray(Image.open(folder / name))[0, 0]))

    def encode(pixels):
        encoded.append(len(pixels))
        return pixels[:, 0, :2, :]

    def features(**hashes):
        images = {f"{name}.png": sha256 for name, sha256 in hashes.items()}
        return open_feature_cache(images, folder, load, encode, "tower").of([*images])

    assert features(b="1", a="1")[:, 0, 0].tolist() == [100, 100]
    assert features(a="1", b="1").shape == (2, 2, 4)
    assert encoded == [2]
    Image.new("L", (5, 4), 200).save(folder / "b.png")
    assert features(b="2", a="1")[:, 0, 0].tolist() == [200, 100]
    assert encoded == [2, 2]
    features(a="1")
    open_feature_cache({"a.png": "1"}, folder, load, encode, "another tower")
    assert encoded == [2, 2, 1, 1]


def test_features_are_in_use_as_long_as_a_data_set_has_them(tmp_path):
    (tmp_path / "images").mkdir()
    Image.new("L", (4, 4)).save(tmp_path / "images" / "a.png")
    given = (lambda name: torch.zeros(1, 3, 4, 4), lambda pixels: pixels[:, 0], "tower")
    features = open_feature_cache({"a.png": "1"}, tmp_path / "images", *given)
    folder, copied = features.folder, pickle.dumps(features)
    assert in_use(folder)
    del features
    assert not in_use(folder)
    in_a_worker = pickle.loads(copied)
    assert in_use(folder)
    assert len(in_a_worker) == 1


@pytest.fixture
def grey_picture(tmp_path, open_lines):
    """Paint a picture of the lines in a grey, with its file's times as they were, and read its features: its grey."""
    folder = tmp_path / "pictures"
    folder.mkdir()

    def features(grey: int | None, folder=folder) -> float:
        if grey is not None:
            Image.new("L", (4, 4), grey).save(folder / "a.bmp")
            os.utime(folder / "a.bmp", (1, 1))
        dataset = open_lines([line("<image>", "Grey.", "a.bmp")], images=folder)

        def load(name):
            return torch.full((1, 3, 4, 4), float(np.asarray(Image.open(folder / name))[0, 0]))

        def encode(pixels):
            features.encoded += 1
            return pixels[:, 0]

        cache = open_feature_cache(dataset.image_hashes(), folder, load, encode, "tower")
        (value,) = cache.of(["a.bmp"]).unique().tolist()
        return value

    features.encoded = 0
    return features


def test_a_picture_painted_over_is_seen_anew_though_size_and_time_are_as_they_were(grey_picture):
    assert grey_picture(100) == 100
    assert grey_picture(200) == 200


def test_pictures_that_are_copied_or_only_touched_keep_their_features(grey_picture, tmp_path):
    assert grey_picture(100) == 100
    os.utime(tmp_path / "pictures" / "a.bmp", (2, 2))
    assert grey_picture(None) == 100
    shutil.copytree(tmp_path / "pictures", tmp_path / "copied")
    shutil.copytree(tmp_path / ".cache" / "pictures", tmp_path / ".cache" / "copied")
    assert grey_picture(None, tmp_path / "copied") == 100
    assert grey_picture.encoded == 1
