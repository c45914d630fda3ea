"""benchmarks/long_context.py: loss by position, the needle at its depth, and a whole run."""

import json
import math
import random

import pytest
import torch
from torch.nn import functional as F

from benchmarks import long_context
from tests.conftest import write_jsonl
from tests.model.networks import network
from tests.scripts.conversion import save_model


def test_nats_are_counted_by_the_position_they_are_predicted_at(monkeypatch):
    monkeypatch.setattr(long_context, "EDGES", (4, 8, 16))
    model = network()
    ids = torch.randint(3, 96, (2, 10), generator=torch.Generator().manual_seed(0))
    found = long_context.nats_by_position(model, ids)
    with torch.no_grad():
        nats = F.cross_entropy(model(ids).logits[:, :-1].transpose(1, 2), ids[:, 1:], reduction="none")
    # position 0 is never predicted, so the first stretch has 3 tokens per row, the second 4, the third 2
    expected = [nats[:, 0:3].mean(), nats[:, 3:7].mean(), nats[:, 7:9].mean()]
    assert found == pytest.approx([value.item() for value in expected], rel=1e-5)


@pytest.mark.parametrize("depth", [0.1, 0.5, 0.9])
def test_the_needle_lies_at_its_depth_and_is_asked_for_at_the_end(depth, tiny_tokenizer):
    prompt, answer = long_context.haystack(random.Random(0), tiny_tokenizer, 900, depth)
    assert len(prompt) + len(answer) <= 900
    text, word = tiny_tokenizer.decode(prompt[1:]), tiny_tokenizer.decode(answer)
    needle = text.index("The secret word of")
    assert text[needle:].split(".")[0].endswith(word)
    assert text.endswith(text[needle:].split(" is ")[0] + " is")
    assert text.count("The secret word of") == 2
    assert abs(needle / len(text) - depth) < 0.15


def test_a_run_measures_each_way_before_and_after(tiny_tokenizer, tokenizer_dir, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(long_context, "EDGES", (64, 128, 256))
    model = network(vocab_size=len(tiny_tokenizer), max_seq_len=64, trained_seq_len=64)
    path = save_model(model, tiny_tokenizer, tmp_path / "pretrain_32.pth")
    about = json.loads(path.with_suffix(".json").read_text())
    about["config"]["trained_seq_len"] = 64
    path.with_suffix(".json").write_text(json.dumps(about))
    data = write_jsonl(tmp_path / "texts.jsonl", [{"text": f"There are {n} birds above the sea."} for n in range(200)])
    flags = f"--weights {path} --data_path {data} --tokenizer {tokenizer_dir} --longest 256 --rows 1 --needles 1"
    flags += f" --finetune_steps 2 --finetune_len 128 --out_dir {tmp_path / 'out'} --device cpu"
    monkeypatch.setattr("sys.argv", ["long_context.py", *flags.split()])
    long_context.main()
    said = json.loads((tmp_path / "out" / "results.json").read_text())
    assert said["trained"] == 64
    results = said["results"]
    assert [*results] == [name for way in long_context.WAYS for name in (way, f"{way}, fine-tuned")]
    assert all(math.isfinite(nats) for found in results.values() for nats in found["nats"])
    assert len({tuple(found["nats"]) for found in results.values()}) == len(results), "each computes something else"
    assert (tmp_path / "out" / "long_context.png").read_bytes()[:4] == b"\x89PNG"
    assert "trained on rows of 64" in capsys.readouterr().out
