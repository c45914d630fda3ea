"""scripts/demo_vlm.py from images to contact sheet, at a tiny size; its exam, and telling seeing from guessing."""

import json
import math
from unittest.mock import MagicMock

import pytest
import torch
from PIL import Image

from model import LMConfig, MiniMindLM
from model.images import default_processor, image_token_id, prepare_chat
from model.model_vlm import MiniMindVLM, VLMConfig
from model.tokenizer import tokenizer_hash
from scripts import contact_sheet, demo_vlm
from scripts.demo.vision_exam import look, shares, shuffled
from tests.conftest import write_jsonl
from tests.running import TINY_TRAINING, call_script
from trainer.weights import architecture, load_tokenizer


@pytest.fixture
def tiny_demo(tmp_path, monkeypatch):
    """The demo with an untrained language model, a handful of images and two steps of each stage."""
    data, out, tokenizer = tmp_path / "data", tmp_path / "out", load_tokenizer()
    data.mkdir()
    out.mkdir()
    torch.manual_seed(0)
    config = LMConfig(dim=32, n_layers=2, vocab_size=len(tokenizer))
    torch.save(MiniMindLM(config).state_dict(), out / "full_sft_32.pth")
    about = {"config": architecture(config), "tokenizer": tokenizer_hash(tokenizer), "stage": "full_sft"}
    (out / "full_sft_32.json").write_text(json.dumps(about), encoding="utf-8")
    for exam in demo_vlm.EXAMS:
        asked = [{"question": "1 + 1?", "answers": ["2"], "kind": "sum", "lang": lang} for lang in ("en", "zh")]
        write_jsonl(data / f"eval_{exam}.jsonl", asked)
    tower = ("--image_size", "32", "--width", "32", "--layers", "1", "--batch_size", "8", "--steps", "2")
    training = (*TINY_TRAINING[:-2], "--eval_interval", "0", "--max_seq_len", "256", "--cache_features")
    for name, value in {
        "DATA": data,
        "OUT": out,
        "SIZE": ("--dim", "32", "--n_layers", "2"),
        "PICTURES": ("--scale", "0.001"),
        "TOWER": tower,
        "TRAINING": training,
        "PRETRAIN": ("--max_steps", "2"),
        "SFT": ("--max_steps", "2"),
        "run": lambda script, *flags: call_script(script, *flags),
    }.items():
        monkeypatch.setattr(demo_vlm, name, value)
    monkeypatch.setattr("sys.argv", ["demo_vlm.py"])
    return out


def test_from_pictures_to_answers_and_again(tiny_demo, capsys, monkeypatch):
    asked = []
    monkeypatch.setattr(demo_vlm, "look", lambda *given: asked.append(given[-1]) or look(*given))
    demo_vlm.main()
    assert asked[-1] == shuffled(asked[-2]) != asked[-2], "the second time with each other's pictures"
    shown = capsys.readouterr().out
    assert "zero-shot" in shown
    assert "missed" in shown  # two steps reach no threshold
    figures = json.loads((tiny_demo / "accuracy_vlm.json").read_text())
    for lang in ("en", "zh"):
        for kind in demo_vlm.BARS:
            row = figures["pictures"][f"{lang}/{kind}"]
            assert 0 <= row["right"] <= 1
            assert row["asked"] >= 8
            assert 0 < row["majority"] <= 1
    assert figures["text_before"] == figures["text_after"] == {"en": 0.0, "zh": 0.0}
    with Image.open(tiny_demo / "contact_sheet.png") as sheet:
        assert sheet.width > 300

    made = [tiny_demo / "clip" / "model.safetensors", tiny_demo / "sft_vlm_32.pth"]
    before = [path.read_bytes() for path in made]
    demo_vlm.main()  # nothing is left to train
    assert [path.read_bytes() for path in made] == before
    assert "encoding images" not in capsys.readouterr().err

    monkeypatch.setattr(demo_vlm, "PICTURES", ("--scale", "0.001", "--seed", "7"))
    demo_vlm.main()  # other images: the tower, and what was trained with it, are out of date
    assert all(path.read_bytes() != old for path, old in zip(made, before, strict=True))


def test_a_language_model_is_made_where_there_is_none(tiny_demo, monkeypatch):
    called = []

    def run(script, *flags):
        called.append(script)
        raise KeyboardInterrupt

    (tiny_demo / "full_sft_32.pth").unlink()
    monkeypatch.setattr(demo_vlm, "run", run)
    with pytest.raises(KeyboardInterrupt):
        demo_vlm.main()
    assert called == ["scripts/demo.py"]


def test_a_sheet_of_more_questions_than_there_are_shows_all_english_ones(tmp_path, monkeypatch):
    exam = [{"question": f"{lang}{n}", "lang": lang} for n in range(3) for lang in ("en", "zh")]
    write_jsonl(tmp_path / "eval_vlm.jsonl", exam)
    shown = []
    for name in ("open_vision", "load_tokenizer", "load_vlm", "look"):
        monkeypatch.setattr(contact_sheet, name, MagicMock())
    monkeypatch.setattr(contact_sheet, "draw_sheet", lambda asked, *_: shown.extend(asked))
    call_script("scripts/contact_sheet.py", "--data_dir", tmp_path, "--count", "4")
    assert sorted(question["question"] for question in shown) == ["en0", "en1", "en2"]


@pytest.mark.parametrize("asked", [1, 3, 4, 5])
def test_a_sheet_draws_every_question_though_the_last_row_is_not_full(tmp_path, monkeypatch, asked):
    Image.new("RGB", (16, 16)).save(tmp_path / "a.png")
    exam = [{"question": f"{n}?", "answers": ["yes"], "image": ["a.png"] * (1 + n % 2)} for n in range(asked)]
    drawn = []
    monkeypatch.setattr(contact_sheet, "is_right", lambda reply, answers: drawn.append(reply) or True)
    contact_sheet.draw_sheet(exam, [str(n) for n in range(asked)], tmp_path, 3, tmp_path / "sheet.png")
    assert drawn == [str(n) for n in range(asked)]
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.height > sheet.width / 3 * math.ceil(asked / 3)


class TestExamination:
    EXAM = tuple(
        {"image": [f"{n}.png"], "question": f"{kind}{n}", "answers": [f"{kind} {n % 3}."], "kind": kind, "lang": lang}
        for kind in ("a", "b")
        for lang in ("en", "zh")
        for n in range(9)
    )

    def test_shuffling_keeps_the_questions_and_moves_pictures_within_a_kind_and_language(self):
        mixed = shuffled(self.EXAM)
        assert [q | {"image": None} for q in mixed] == [q | {"image": None} for q in self.EXAM]
        for lang in ("en", "zh"):
            for kind in ("a", "b"):
                group = [q["image"][0] for q in mixed if (q["lang"], q["kind"]) == (lang, kind)]
                assert sorted(group) == [f"{n}.png" for n in range(9)]
                assert group != sorted(group)

    def test_shares_by_hand(self):
        exam = [q for q in self.EXAM if (q["lang"], q["kind"]) == ("en", "a")][:8]  # answers 0 1 2 0 1 2 0 1
        right = ["A 0", "a 1.", "a 2", "a 0", "a 1", "a 0", "a 1", "no"]
        (row,) = shares(exam, right, ["a 0"] * 8).values()
        assert row["right"] == 5 / 8
        assert row["majority"] == row["shuffled"] == 3 / 8
        assert row["asked"] == 8
        assert row["limit"] == pytest.approx(3 / 8 + 3 * math.sqrt(3 / 8 * 5 / 8 / 8))

    def test_many_at_once_are_answered_as_one_by_one(self, tmp_path, clip_dir, tiny_tokenizer):
        """Prompts of different lengths and numbers of images share batches; the oracle answers one at a time."""
        for n in range(3):
            Image.linear_gradient("L").rotate(90 * n).convert("RGB").resize((32, 32)).save(tmp_path / f"{n}.png")
        torch.manual_seed(0)
        place = image_token_id(tiny_tokenizer)
        config = VLMConfig(dim=32, n_layers=2, vocab_size=len(tiny_tokenizer), image_token_id=place)
        model, processor = MiniMindVLM(config, vision_model=clip_dir).eval(), default_processor(32)
        for weight in model.parameters():
            torch.nn.init.normal_(weight.data, std=0.3)  # otherwise it repeats itself, whatever the image
        exam = [
            {"image": ["0.png"], "question": "What?"},
            {"image": ["1.png", "2.png"], "question": "Are they the same?"},
            {"image": ["2.png"], "question": "What is the capital of the green island?"},
            {"image": ["1.png"], "question": "What?"},
        ]
        expected = []
        for question in exam:
            content = [*(tmp_path / name for name in question["image"]), question["question"]]
            prompt = prepare_chat(tiny_tokenizer, [{"role": "user", "content": content}], config, processor)
            written = [int(token) for token in model.stream(prompt.input_ids, max_new_tokens=24, **prompt.images)]
            expected.append(tiny_tokenizer.decode(written, skip_special_tokens=True))
        assert len(set(expected)) > 1
        assert look(model, tiny_tokenizer, processor, tmp_path, exam, batch_size=3) == expected
