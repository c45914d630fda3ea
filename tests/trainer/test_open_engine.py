"""trainer/loading.py: the engine that the command line's flags describe."""

from argparse import Namespace

import pytest
import torch

from tests.model.networks import network
from trainer import loading
from trainer.errors import UserError
from trainer.loading import open_engine


def flags(**said) -> Namespace:
    usual = {"dtype": None, "deterministic": False, "compile": None, "speculate": 0, "draft": None}
    return Namespace(**usual | {"out_dir": ".", "dim": 32, "use_moe": False} | said)


@pytest.fixture
def asked(monkeypatch) -> list[dict]:
    """The arguments that `Engine` is called with; no engine is made."""
    calls = []
    monkeypatch.setattr(loading, "Engine", lambda *given, **how: calls.append(how))
    return calls


def test_the_precision_and_the_kernels_are_those_of_the_flags(asked):
    for said, dtype in ((None, None), ("float32", torch.float32), ("bfloat16", torch.bfloat16), ("int4", "int4")):
        open_engine(network(), "tokenizer", flags(dtype=said, deterministic=True, speculate=3), 2)
        assert asked[-1]["dtype"] == dtype
        assert asked[-1]["deterministic"]
        assert asked[-1]["speculate"] == 3
        assert asked[-1]["draft"] is None


@pytest.mark.parametrize(
    ("said", "large", "from_size", "compiled"),
    [
        (None, True, 1, True),
        (None, True, 10**9, False),
        (None, False, 1, False),
        (True, False, 10**9, True),
        (False, True, 1, False),
    ],
)
def test_a_step_is_compiled_where_that_is_asked_or_the_model_is_large(
    asked, monkeypatch, said, large, from_size, compiled
):
    monkeypatch.setattr(loading, "COMPILE_FROM", from_size)
    open_engine(network(), "tokenizer", flags(compile=said), 1, compile_large=large)
    assert asked[-1]["compile"] is compiled


def test_a_model_that_int4_cannot_divide_is_refused_in_one_line(tiny_tokenizer):
    odd = network(dim=40, n_heads=2, vocab_size=len(tiny_tokenizer))
    with pytest.raises(UserError, match=r"^--dtype int4: int4 takes matrices whose rows are multiples of 32"):
        open_engine(odd, tiny_tokenizer, flags(dtype="int4"), 1)


def test_a_draft_model_is_loaded_from_its_weights(asked, tiny_out, tiny_tokenizer):
    model = network(vocab_size=len(tiny_tokenizer))
    open_engine(model, tiny_tokenizer, flags(draft=str(tiny_out / "pretrain_32.pth")), 1)
    assert asked[-1]["draft"].config.dim == 32
    with pytest.raises(UserError, match="has a vocabulary of"):
        open_engine(network(), tiny_tokenizer, flags(draft=str(tiny_out / "pretrain_32.pth")), 1)
