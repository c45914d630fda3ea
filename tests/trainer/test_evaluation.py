"""Loss on held-out rows: compared with transformers' cross-entropy, row by row; bytes counted by hand."""

import math

import pytest
import torch
from torch import nn

from dataset import PretrainDataset, SFTDataset
from model import LMConfig, MiniMindLM
from trainer.evaluation import EvaluationError, evaluate
from trainer.runtime import Runtime


@pytest.fixture
def model(tiny_tokenizer):
    torch.manual_seed(0)
    return MiniMindLM(LMConfig(dim=32, n_layers=1, n_heads=4, vocab_size=len(tiny_tokenizer)))


@pytest.mark.parametrize(("kind", "name"), [(PretrainDataset, "pretrain_hq"), (SFTDataset, "sft_mini_512")])
@pytest.mark.parametrize("packing", [True, False])
def test_nats_per_token_and_bits_per_byte(model, tiny_tokenizer, tiny_data, kind, name, packing):
    rows = kind(tiny_data / f"{name}.jsonl", tiny_tokenizer, max_seq_len=200, packing=packing)
    run = Runtime(torch.device("cpu"), torch.float32)
    values = evaluate(model.train(), rows, tiny_tokenizer, run, batch_size=3)
    assert model.training  # as before

    nats = tokens = text_bytes = 0
    with torch.no_grad():
        for row in rows:
            logits = model.eval()(row["input_ids"][None], position_ids=row["position_ids"][None]).logits[0]
            targets = row["labels"][1:]
            nats += nn.functional.cross_entropy(logits[:-1], targets, reduction="sum", ignore_index=-100).item()
            learned = targets[targets != -100]
            tokens += len(learned)
            for token in learned.tolist():
                if token > 2:  # special tokens are not text
                    text_bytes += len(tiny_tokenizer.backend_tokenizer.id_to_token(token))  # one character per byte
    assert values["eval_loss"] == pytest.approx(nats / tokens, rel=1e-5)
    assert values["eval_bits_per_byte"] == pytest.approx(nats / math.log(2) / text_bytes, rel=1e-5)
    assert evaluate(model, rows, tiny_tokenizer, run, batch_size=50) == pytest.approx(values, rel=1e-5)


class OneOfTwo(Runtime):
    """One rank of two; `sum` adds the other rank's result."""

    others: tuple = ()

    def sums(self, *values):
        self.found = values
        return [ours + theirs for ours, theirs in zip(values, self.others or [0.0] * len(values), strict=True)]


def test_two_ranks_find_together_what_one_finds(model, tiny_tokenizer, tiny_data):
    """Each rank evaluates its share of the rows."""
    rows = PretrainDataset(tiny_data / "pretrain_hq.jsonl", tiny_tokenizer, max_seq_len=100)
    cpu = torch.device("cpu")
    alone = evaluate(model, rows, tiny_tokenizer, Runtime(cpu, torch.float32), batch_size=3)
    second, first = (OneOfTwo(cpu, torch.float32, rank, world_size=2) for rank in (1, 0))
    half = evaluate(model, rows, tiny_tokenizer, second, batch_size=3)
    first.others = second.found
    assert evaluate(model, rows, tiny_tokenizer, first, batch_size=3) == pytest.approx(alone, rel=1e-5)
    assert half["eval_loss"] != pytest.approx(alone["eval_loss"], rel=1e-4)


class Breaking(nn.Module):
    """A model that runs out of memory, sharded as by a stage of ZeRO."""

    def __init__(self, stage: int):
        super().__init__()
        self.zero_optimization_stage = lambda: stage

    def forward(self, **_):
        assert not self.training
        raise MemoryError("no room")


def test_one_that_fails_says_so_and_leaves_the_model_as_it_was(tiny_tokenizer, tiny_data):
    rows = PretrainDataset(tiny_data / "pretrain_hq.jsonl", tiny_tokenizer, max_seq_len=64)
    run = Runtime(torch.device("cpu"), torch.float32)
    for stage in (0, 1, 2):
        model = Breaking(stage)
        with pytest.raises(EvaluationError) as told:
            evaluate(model, rows, tiny_tokenizer, run, batch_size=3)
        assert isinstance(told.value.__cause__, MemoryError)
        assert model.training
    with pytest.raises(MemoryError):  # the other ranks wait in the middle of a layer: the run cannot continue
        evaluate(Breaking(3), rows, tiny_tokenizer, run, batch_size=3)


def test_a_tokenizer_that_cannot_say_its_bytes_is_a_failed_evaluation(model, tiny_tokenizer, tiny_data):
    rows = PretrainDataset(tiny_data / "pretrain_hq.jsonl", tiny_tokenizer, max_seq_len=64)
    with pytest.raises(EvaluationError):
        evaluate(model, rows, None, Runtime(torch.device("cpu"), torch.float32), batch_size=3)
    assert model.training


def test_nothing_is_dropped_out_of_an_evaluation(tiny_tokenizer, tiny_data):
    model = MiniMindLM(LMConfig(dim=32, n_layers=1, n_heads=4, vocab_size=len(tiny_tokenizer), dropout=0.5))
    rows = PretrainDataset(tiny_data / "pretrain_hq.jsonl", tiny_tokenizer, max_seq_len=100)
    run = Runtime(torch.device("cpu"), torch.float32)
    learning, waiting = (evaluate(model.train(on), rows, tiny_tokenizer, run, batch_size=3) for on in (True, False))
    assert learning == waiting
