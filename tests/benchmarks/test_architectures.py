"""benchmarks/architectures.py: one row and seed per call, no repeated training, resumption, models of equal size."""

import json
from functools import partial

import pytest

from benchmarks import architectures
from model import LMConfig, MiniMindLM

STOPPED = RuntimeError("the plug is pulled")


@pytest.fixture
def call(compare, monkeypatch):
    tiny = {"dim": 32, "n_layers": 1, "hidden_dim": 16, "n_heads": 4}
    for row, sizes in architectures.ROWS.items():
        monkeypatch.setitem(architectures.ROWS, row, sizes | tiny)
    monkeypatch.setattr(architectures, "WRITTEN_TOKENS", 4)
    return partial(compare, architectures, "--steps", "3")


def test_the_table_grows_row_by_row_and_seed_by_seed(call, tmp_path, monkeypatch):
    said = call("--row", "mtp_2")
    cells = [cell.strip() for cell in said.splitlines()[-1].split("|")[1:-1]]
    assert (cells[0], cells[3], cells[6]) == ("mtp_2", "1", "-")
    assert cells[7].count("%") == 2
    assert float(cells[8]) >= 1
    assert "parameters on cpu" not in call("--row", "mtp_2"), "nothing is trained twice"
    call("--row", "fine_bias")
    call("--row", "fine_bias", "--seed", "2")
    said = call("--row", "gqa", "--seed", "2")
    assert [line.split("|")[1].strip() for line in said.splitlines()[-3:]] == ["gqa", "fine_bias", "mtp_2"]
    assert said.count("±") == 2  # bits per byte and violation of fine_bias
    (folder,) = (tmp_path / "out").iterdir()
    assert (folder / "violation.png").stat().st_size > 0
    before = json.loads((folder / "fine_bias_seed_1.json").read_text(encoding="utf-8"))
    assert [len(layers[0]) for layers in before["loads"]] == [16] * 3

    (folder / "fine_bias_seed_1.json").unlink()  # again, interrupted and resumed
    monkeypatch.setattr(architectures, "SAVE_EVERY", 0.0)
    saves = iter([None, STOPPED])

    def save(content, path, right=architectures.save_tensors):
        right(content, path)
        if (stop := next(saves, None)) is not None:
            raise stop

    monkeypatch.setattr(architectures, "save_tensors", save)
    with pytest.raises(RuntimeError, match="plug"):
        call("--row", "fine_bias")
    assert "continuing after" in call("--row", "fine_bias")
    after = json.loads((folder / "fine_bias_seed_1.json").read_text(encoding="utf-8"))
    assert {k: v for k, v in after.items() if k != "seconds"} == {k: v for k, v in before.items() if k != "seconds"}


def test_all_rows_have_about_7m_parameters():
    def parameters(sizes: dict) -> int:
        model = MiniMindLM(LMConfig(**sizes))
        return sum(p.numel() for name, p in model.named_parameters() if not name.startswith("mtp."))

    plain = parameters(architectures.ROWS["gqa"])
    assert 7.0e6 < plain < 7.5e6
    for row, sizes in architectures.ROWS.items():
        assert parameters(sizes) == pytest.approx(plain, rel=0.02), row
