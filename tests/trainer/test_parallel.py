"""When blocks are compiled; what is removed from a model, or compared, before ranks share it."""

from types import SimpleNamespace

import pytest
import torch

from trainer import parallel as engine
from trainer.errors import UserError
from trainer.parallel import full_state_dict, require_same_weights, wrap_model
from trainer.runtime import Runtime

RUN = Runtime(torch.device("cpu"), torch.float32)


def settings(**changes) -> SimpleNamespace:
    common = {"compile": None, "packing": True, "batch_size": 32, "accumulation_steps": 1, "max_seq_len": 512}
    return SimpleNamespace(**common | changes)


def test_by_itself_where_it_works_and_pays(monkeypatch):
    monkeypatch.setattr(engine, "why_not_compile", lambda device: None)
    assert engine.should_compile(settings(), RUN, steps=1000)
    assert not engine.should_compile(settings(), RUN, steps=10)
    assert not engine.should_compile(settings(packing=False), RUN, steps=1000)
    assert not engine.should_compile(settings(compile=False), RUN, steps=1000)
    assert engine.should_compile(settings(compile=True), RUN, steps=1)
    for stage, compiles in ((2, True), (3, False)):
        run = Runtime(RUN.device, torch.float32, deepspeed_config={"zero_optimization": {"stage": stage}})
        assert engine.should_compile(settings(), run, steps=1000) == compiles


def test_it_pays_by_all_tokens_of_the_run(monkeypatch):
    monkeypatch.setattr(engine, "why_not_compile", lambda device: None)
    for batches, compiles in ((19, False), (20, True)):
        args = settings(batch_size=2, accumulation_steps=batches, max_seq_len=500)
        assert engine.should_compile(args, RUN, steps=100) == compiles


def test_a_prototype_is_not_used_unasked(monkeypatch):
    monkeypatch.setattr(engine, "why_not_compile", lambda device: None)
    run = Runtime(torch.device("mps"), torch.float32)
    assert not engine.should_compile(settings(), run, steps=1000)
    assert engine.should_compile(settings(compile=True), run, steps=1000)


@pytest.mark.parametrize("compiler", ["g++", "clang++", "cl"])
def test_any_compiler_that_inductor_takes(compiler, monkeypatch):
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(engine.shutil, "which", lambda name: name if name == compiler else None)
    monkeypatch.setattr(torch, "compile", lambda function: function)
    assert engine.why_not_compile(RUN.device) is None


def test_without_a_compiler_it_is_off_and_cannot_be_forced(monkeypatch):
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", "/nowhere")
    assert not engine.should_compile(settings(), RUN, steps=1000)
    with pytest.raises(UserError, match=r"--compile does not work here \(no C\+\+ compiler found\)"):
        engine.should_compile(settings(compile=True), RUN, steps=1000)


def test_whatever_keeps_it_from_working_is_told(monkeypatch):
    def broken(function):
        raise OSError("Python.h: no such file\nand a page more")

    monkeypatch.setenv("CXX", "c++")
    monkeypatch.setattr(torch, "compile", broken)
    assert engine.why_not_compile(RUN.device) == "OSError: Python.h: no such file"


class Views(torch.nn.Module):
    """A buffer, a view of its beginning, and the same buffer under another name."""

    def __init__(self):
        super().__init__()
        self.register_buffer("whole", torch.arange(6.0))
        self.register_buffer("part", self.whole[:3])
        self.register_buffer("again", self.whole)


def test_what_begins_at_one_place_is_one_only_where_it_has_one_shape():
    model = Views()
    state = full_state_dict(model, Runtime(torch.device("cpu"), torch.float32), lambda key: True)
    assert [value.tolist() for value in state.values()] == [[0, 1, 2, 3, 4, 5], [0, 1, 2], [0, 1, 2, 3, 4, 5]]
    assert state["again"].data_ptr() == state["whole"].data_ptr()


def test_ranks_with_other_weights_are_named(monkeypatch):
    run = Runtime(torch.device("cpu"), torch.float32, world_size=3)
    model = torch.nn.Linear(2, 2)
    monkeypatch.setattr(run, "gather", lambda value: [value, value, "another"], raising=False)
    with pytest.raises(UserError, match="rank 2 has different weights from rank 0"):
        wrap_model(model, None, None, run, compile_blocks=False)
    monkeypatch.setattr(run, "gather", lambda value: [value, value, value], raising=False)
    require_same_weights(model, run)
