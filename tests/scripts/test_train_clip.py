"""The contrastive loss by hand, and a tower trained for real."""

import json
import math
import random
import re
import shutil
from argparse import Namespace
from collections import Counter

import pytest
import torch
from PIL import Image
from transformers import AutoTokenizer, CLIPModel

from dataset.records import BadRecord
from model.images import image_processor
from model.model_vlm import load_tower
from scripts import train_clip
from scripts.train_clip import caption_vectors, info_nce, make_clip, picture_vectors, save, train_caption_tokenizer
from tests.conftest import write_jsonl
from tests.running import call_script, one_error_line, run_script
from trainer.errors import UserError

NEVER = torch.eye(3, dtype=torch.bool)


def test_a_folder_under_a_link_is_replaced_where_it_lies(tmp_path, clip_dir, tiny_tokenizer):
    big, link = tmp_path / "disk" / "clip", tmp_path / "clip"
    big.parent.mkdir()
    link.symlink_to(big)
    clip = CLIPModel.from_pretrained(clip_dir)
    for share in (0.5, 0.6):  # the first, and one above it
        save(clip, tiny_tokenizer, Namespace(out_dir=link, image_size=32), {"share": share})
    assert link.is_symlink()
    assert (big / "zero_shot.json").read_text().split() == ["{", '"share":', "0.6", "}"]
    assert [path.name for path in big.parent.iterdir()] == ["clip"]
    assert not list(tmp_path.glob(".*"))


def test_a_folder_that_its_tokenizer_could_not_be_written_to_is_refused_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["train_clip.py", "--out_dir", str(tmp_path / "a\udcff")])
    with pytest.raises(UserError, match=r"^--out_dir .*: the path is not UTF-8"):
        train_clip.main()


def test_info_nce_by_hand():
    images, texts = torch.tensor([[2.0, 0.0], [0.0, 3.0]]), torch.tensor([[1.0, 0.0], [0.6, 0.8]])
    # cosines 1, 0.6 / 0, 0.8; scale 2
    rows = -math.log(math.exp(2) / (math.exp(2) + math.exp(1.2))) - math.log(math.exp(1.6) / (1 + math.exp(1.6)))
    columns = -math.log(math.exp(2) / (math.exp(2) + 1)) - math.log(math.exp(1.6) / (math.exp(1.6) + math.exp(1.2)))
    loss = info_nce(images, texts, torch.tensor(2.0), torch.eye(2, dtype=torch.bool))
    assert float(loss) == pytest.approx((rows + columns) / 4, abs=1e-6)


def test_a_caption_is_right_of_every_picture_that_it_is_true_of():
    """Compared with a slow loop over all pairs: the target is divided among all that match."""
    generator = torch.Generator().manual_seed(0)
    images, texts = torch.randn(4, 8, generator=generator), torch.randn(4, 8, generator=generator)
    texts[2] = texts[0]
    words = ["a star", "a ring", "a star", "a red star"]
    known = [{"a star"}, {"a ring"}, {"a star", "a blue star"}, {"a star", "a red star"}]  # matches every image
    true = torch.tensor([[text in texts for text in words] for texts in known])
    expected = 0.0
    for left, right, truth in ((images, texts, true), (texts, images, true.T)):
        for i in range(4):
            cosines = [float(left[i] @ right[j] / left[i].norm() / right[j].norm()) for j in range(4)]
            total = sum(math.exp(5 * cosine) for cosine in cosines)
            right_ones = [j for j in range(4) if truth[i, j]]
            expected -= sum(5 * cosines[j] - math.log(total) for j in right_ones) / len(right_ones) / 8
    assert not true.equal(true.T)
    assert float(info_nce(images, texts, torch.tensor(5.0), true)) == pytest.approx(expected, abs=1e-5)


def test_it_is_least_where_pairs_agree_and_the_temperature_learns():
    vectors, scale = torch.eye(3), torch.tensor(3.0, requires_grad=True)
    agreeing = info_nce(vectors, vectors, scale, NEVER)
    agreeing.backward()
    assert scale.grad < 0  # right but not confident enough: sharper
    assert agreeing < info_nce(vectors, vectors.roll(1, 0), scale, NEVER)
    assert float(info_nce(vectors, vectors, torch.tensor(0.0), NEVER)) == pytest.approx(math.log(3))


def test_the_text_network_reads_its_vector_at_the_captions_end():
    tokenizer = train_caption_tokenizer(["a red circle", "一个红色圆形"])
    short, long = tokenizer(["red", "a red circle"], padding=True)["input_ids"]
    assert len(short) == len(long)
    for ids in (short, long):
        assert ids[0] == tokenizer.bos_token_id
        assert ids.count(tokenizer.eos_token_id) == 1
    assert tokenizer.eos_token_id != 2  # if it is 2, transformers takes the largest id, as for the first CLIPs
    assert tokenizer.decode(long, skip_special_tokens=True).strip() == "a red circle"


def test_the_patch_tokens_are_taught_which_the_class_token_leaves_alone():
    """Checked by the gradient of the last layer's output."""
    shape = Namespace(image_size=32, patch_size=8, width=32, layers=2)
    clip = make_clip(shape, train_caption_tokenizer(["a red circle"]), longest=8)
    hidden = []
    clip.vision_model.encoder.layers[-1].register_forward_hook(lambda *about: hidden.append(about[-1]))
    by_class, by_patches = picture_vectors(clip, torch.randn(2, 3, 32, 32))
    (tokens,) = hidden
    for vectors, class_learns in ((by_class, True), (by_patches, False)):
        (gradient,) = torch.autograd.grad(vectors[:, 0].sum(), tokens, retain_graph=True)
        assert bool(gradient[:, 0].any()) == class_learns
        assert bool(gradient[:, 1:].any()) != class_learns


def test_a_patch_knows_its_row_and_its_column_from_the_start():
    shape = Namespace(image_size=32, patch_size=8, width=64, layers=1)
    clip = make_clip(shape, train_caption_tokenizer(["a red circle"]), longest=8)
    places = clip.vision_model.embeddings.position_embedding.weight[1:].reshape(4, 4, 64)
    torch.testing.assert_close(places[0, 1] - places[0, 0], places[3, 1] - places[3, 0])
    torch.testing.assert_close(places[1, 0] - places[0, 0], places[1, 3] - places[0, 3])
    assert places[0, 0].dist(places[2, 3]) > 1


def test_the_share_of_pictures_whose_caption_is_the_nearest(monkeypatch, clip_dir):
    """By angles: image i points in direction i, caption n in direction n, with any lengths; there are more of both than
    fit into one batch."""
    draw, counts = random.Random(0), {}
    exam = []
    for i in range(300):
        kind, lang, n = draw.choice(["what", "where"]), draw.choice(["en", "zh"]), draw.choice([2, 3])
        choices, answer = draw.sample(range(2000), n), draw.randrange(n)
        exam.append((kind, lang, [str(choice) for choice in choices], answer))
        nearest = max(range(n), key=lambda place: math.cos(choices[place] - i))
        counts.setdefault(f"{lang}: {kind}, one of {n}", []).append(nearest == answer)

    def vectors(angles: torch.Tensor) -> torch.Tensor:
        return torch.stack([angles.cos(), angles.sin()], 1) * (1 + angles[:, None] % 7)

    monkeypatch.setattr(
        train_clip, "caption_vectors", lambda clip, _, texts: vectors(torch.tensor([float(text) for text in texts]))
    )
    monkeypatch.setattr(train_clip, "picture_vectors", lambda clip, pixels: (vectors(pixels[:, 0, 0, 0]), None))
    pixels = torch.arange(300).half().view(300, 1, 1, 1)  # fp16 represents all integers up to 2048
    found = train_clip.zero_shot(CLIPModel.from_pretrained(clip_dir), None, pixels, exam)
    assert len(counts) == 8
    assert found == {name: sum(right) / len(right) for name, right in sorted(counts.items())}
    assert list(found) == sorted(found)


@pytest.mark.parametrize(
    "wrong",
    [{"image": 5}, {"captions": "one"}, {"captions": [5]}, {"captions": [""]}, {"captions": []}],
    ids=lambda wrong: str(wrong),
)
def test_a_line_of_captions_is_a_name_and_texts(wrong):
    right = {"image": "a.png", "captions": ["one", "two"]}
    assert train_clip.caption_record(right, Counter()) == ("a.png", ["one", "two"])
    with pytest.raises(BadRecord, match="captions"):
        train_clip.caption_record(right | wrong, Counter())


def test_a_line_of_choices_is_taken_apart():
    line = {"image": "a.png", "kind": "what", "lang": "en", "choices": ["one", "two"], "answer": 1}
    ignored = Counter()
    assert train_clip.choice_record(line | {"more": 1}, ignored) == ("a.png", "what", "en", ["one", "two"], 1)
    assert ignored == {"more": 1}
    with pytest.raises(BadRecord, match="image"):
        train_clip.choice_record(line | {"image": None}, ignored)


@pytest.fixture(scope="module")
def small_demo(tmp_path_factory):
    """A few images, drawn by the real script."""
    folder = tmp_path_factory.mktemp("demo")
    run_script("scripts/make_demo_images.py", "--out_dir", folder, "--scale", "0.002")
    return folder


def test_a_run_makes_a_clip_folder(small_demo, tmp_path):
    data = ("--data_path", small_demo / "clip_captions.jsonl", "--eval_path", small_demo / "eval_clip.jsonl")
    tiny = ("--image_size", "32", "--width", "32", "--layers", "2", "--batch_size", "8", "--device", "cpu")
    flags = (*data, "--images_path", small_demo / "images", *tiny, "--steps", "6", "--log_interval", "3")
    done = run_script("scripts/train_clip.py", *flags, "--out_dir", tmp_path / "clip")
    assert "zero-shot" in done.stdout
    assert "zh: colour and shape, one of 48" in done.stdout
    clip = CLIPModel.from_pretrained(tmp_path / "clip")
    assert clip.logit_scale.item() != pytest.approx(2.6592, abs=1e-5)  # it learned
    assert AutoTokenizer.from_pretrained(tmp_path / "clip").eos_token_id == clip.config.text_config.eos_token_id
    assert load_tower(tmp_path / "clip").config.hidden_size == 32
    assert image_processor(tmp_path / "clip", 0).crop_size["height"] == 32
    again = run_script("scripts/train_clip.py", *flags, "--out_dir", tmp_path / "clip", exit_code=2)
    assert "--overwrite" in one_error_line(again)

    (tmp_path / "clip" / "model.safetensors").write_bytes(b"old")
    run_script("scripts/train_clip.py", *flags, "--out_dir", tmp_path / "clip", "--overwrite")
    CLIPModel.from_pretrained(tmp_path / "clip")
    assert [path.name for path in tmp_path.iterdir()] == ["clip"]
    for other in (tmp_path, tmp_path / "clip" / "config.json"):  # the folder above it; a file
        refused = run_script("scripts/train_clip.py", *flags, "--out_dir", other, "--overwrite", exit_code=2)
        assert "was not written by this script" in one_error_line(refused)
    assert (tmp_path / "clip" / "model.safetensors").is_file()


def test_a_broken_picture_is_named_with_its_line_or_skipped_and_counted(small_demo, tmp_path, capsys):
    images = shutil.copytree(small_demo / "images", tmp_path / "images")
    first = json.loads((small_demo / "clip_captions.jsonl").read_text(encoding="utf-8").splitlines()[0])["image"]
    (images / first).write_bytes((images / first).read_bytes()[:-40])
    tiny = ("--image_size", "32", "--width", "32", "--layers", "1", "--batch_size", "4", "--steps", "1")
    data = ("--data_path", small_demo / "clip_captions.jsonl", "--eval_path", small_demo / "eval_clip.jsonl")
    flags = (*data, *tiny, "--images_path", images, "--out_dir", tmp_path / "clip", "--device", "cpu")
    call_script("scripts/train_clip.py", *flags, exit_code=2)
    assert f"clip_captions.jsonl, line 1: the image {images / first} cannot be read" in capsys.readouterr().err
    call_script("scripts/train_clip.py", *flags, "--skip_bad_lines")
    assert "clip_captions.jsonl: 1 bad lines skipped, the first: line 1: the image" in capsys.readouterr().out
    nothing = tmp_path / "nothing.jsonl"
    nothing.write_text(json.dumps({"image": first, "captions": ["it"]}) + "\n")
    call_script("scripts/train_clip.py", *flags, "--skip_bad_lines", "--overwrite", "--data_path", nothing, exit_code=2)
    assert "nothing.jsonl has no valid line; 1 bad, the first: line 1: the image" in capsys.readouterr().err


class TestLoop:
    """Training on five images, each with its own caption."""

    @pytest.fixture
    def train(self, tmp_path):
        write_jsonl(tmp_path / "learn.jsonl", [{"image": f"{n}.png", "captions": [f"picture {n}"]} for n in range(5)])
        about = {"image": "0.png", "kind": "which", "lang": "en", "choices": ["picture 0", "picture 1"], "answer": 0}
        write_jsonl(tmp_path / "exam.jsonl", [about])
        for n in range(5):
            Image.new("RGB", (32, 32), (50 * n, 0, 0)).save(tmp_path / f"{n}.png")
        tiny = ("--image_size", "32", "--width", "32", "--layers", "1", "--device", "cpu", "--images_path", tmp_path)
        data = ("--data_path", tmp_path / "learn.jsonl", "--eval_path", tmp_path / "exam.jsonl")
        return lambda *flags: call_script("scripts/train_clip.py", *tiny, *data, "--out_dir", tmp_path / "clip", *flags)

    def test_no_picture_is_seen_again_before_all_have_been_seen(self, train, monkeypatch):
        """Five images do not divide into steps of three: the next step begins with the rest."""
        seen = []
        monkeypatch.setattr(
            train_clip, "caption_vectors", lambda *given: seen.extend(given[2]) or caption_vectors(*given)
        )
        monkeypatch.setattr(train_clip, "zero_shot", lambda *_: {})
        train("--batch_size", "3", "--steps", "5")
        assert [sorted(seen[first : first + 5]) for first in (0, 5, 10)] == [[f"picture {n}" for n in range(5)]] * 3

    def test_every_so_many_steps_are_told_and_the_last_one(self, train, capsys):
        train("--batch_size", "5", "--steps", "5", "--log_interval", "2")
        assert re.findall(r"^step (\d)/5 ", capsys.readouterr().out, re.MULTILINE) == ["2", "4", "5"]

    def test_the_scale_stops_at_a_hundred(self, train, monkeypatch, tmp_path):
        def sharp(*given):
            clip = make_clip(*given)
            clip.logit_scale.data.fill_(50.0)
            return clip

        monkeypatch.setattr(train_clip, "make_clip", sharp)
        train("--batch_size", "5", "--steps", "1")
        assert CLIPModel.from_pretrained(tmp_path / "clip").logit_scale.item() == pytest.approx(math.log(100))
