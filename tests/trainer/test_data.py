"""From the data flags to rows: what is held out, and when old caches are removed."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from trainer import data
from trainer.data import count_steps, open_data
from trainer.runtime import Runtime

RUN = Runtime(torch.device("cpu"), torch.float32)


class Rows(list):
    """A fake dataset: ten rows, or none for the held-out part of "small"."""

    def __init__(self, path, tokenizer, max_seq_len, packing, skip_bad_lines, seed, part):
        super().__init__([] if (path, part) == ("small", "eval") else range(10))
        self.row_tokens, self.data_path, self.packing, self.max_seq_len = np.full(len(self), 7), path, packing, 64
        self.made_of, self.summary = (path, part, max_seq_len, packing, skip_bad_lines, seed), f"{part} of {path}"


def settings(**changes) -> SimpleNamespace:
    usual = {"data_path": "data", "eval_path": None, "eval_interval": 5, "cache_limit": 7.0, "max_steps": None}
    usual |= {"max_seq_len": 64, "packing": True, "skip_bad_lines": False, "seed": 3, "num_workers": 0}
    return SimpleNamespace(**usual | {"batch_size": 2, "accumulation_steps": 2, "epochs": 3} | changes)


@pytest.mark.parametrize(
    ("changes", "train", "held_out"),
    [
        ({}, ("data", "train"), ("data", "eval")),
        ({"eval_path": "other"}, ("data", "all"), ("other", "all")),
        ({"eval_interval": 0}, ("data", "all"), None),
        ({"eval_interval": 0, "eval_path": "other"}, ("data", "all"), None),
        ({"data_path": "small"}, ("small", "train"), None),
    ],
)
def test_what_is_learned_and_what_is_held_out(changes, train, held_out, monkeypatch):
    monkeypatch.setattr(data, "limit_caches", lambda *_: None)
    loader, rows = open_data(Rows, settings(**changes), None, RUN)
    assert loader.dataset.made_of == (*train, 64, True, False, 3)
    assert (rows and rows.made_of) == (held_out and (*held_out, 64, True, False, 3))


@pytest.mark.parametrize(
    ("changes", "train", "held_out"),
    [
        ({}, ("train", 10 + 5), ("eval", 10 + 10)),
        ({"mix": [("small", 1), ("a", 1)]}, ("train", 10 + 10), ("eval", 0 + 10)),
        ({"mix": [("small", 1)]}, ("train", 10), None),
        ({"eval_path": "other"}, ("all", 10 + 5), ("all", 10)),
        ({"eval_interval": 0}, ("all", 10 + 5), None),
    ],
)
def test_files_are_mixed_by_their_shares_and_held_out_from_each(changes, train, held_out, monkeypatch, capsys):
    limited = []
    monkeypatch.setattr(data, "limit_caches", lambda *given: limited.append(given))
    args = settings(**{"mix": [("a", 2), ("b", 1)]} | changes)
    loader, rows = open_data(Rows, args, None, RUN)
    files = loader.dataset.files
    assert [(file.made_of[0], file.made_of[1]) for file in files] == [(name, train[0]) for name, _ in args.mix]
    assert len(loader.dataset) == train[1]
    assert (rows and len(rows)) == (held_out and held_out[1])
    assert limited == [([name for name, _ in args.mix], 7.0)]
    assert "mixed, by tokens: " in capsys.readouterr().out


@pytest.mark.parametrize("later", ["cache_features", "cache_reference", None])
def test_caches_are_limited_here_unless_the_stage_opens_more_of_them(later, monkeypatch):
    limited = []
    monkeypatch.setattr(data, "limit_caches", lambda *given: limited.append(given))
    flags = {"cache_features": False, "cache_reference": False} | ({later: True} if later else {})
    open_data(Rows, settings(**flags), None, RUN)
    assert limited == ([] if later else [(["data"], 7.0)])


@pytest.mark.parametrize(("max_steps", "steps"), [(None, 9), (8, 8), (9, 9), (10, 9)])
def test_steps_are_those_of_the_epochs_or_fewer(max_steps, steps, monkeypatch):
    monkeypatch.setattr(data, "limit_caches", lambda *_: None)
    args = settings(eval_interval=0, max_steps=max_steps)
    loader, _ = open_data(Rows, args, None, RUN)
    assert count_steps(loader, args) == steps
