"""Fixtures of the comparisons that train models."""

from collections.abc import Callable

import pytest

from tests.conftest import write_jsonl


@pytest.fixture
def compare(tmp_path, tokenizer_dir, monkeypatch, capsys) -> Callable[..., str]:
    """Runs a comparison, as `compare(module, *flags)`, on 220 short texts, into tmp_path/out; returns the output."""
    lines = [{"text": f"The little robot counts {n} yellow birds above the sea."} for n in range(220)]
    data = write_jsonl(tmp_path / "texts.jsonl", lines)
    files = ("--data_path", str(data), "--tokenizer", str(tokenizer_dir), "--out_dir", str(tmp_path / "out"))

    def run(module, *flags: str) -> str:
        monkeypatch.setattr("sys.argv", [module.__name__, *files, "--max_seq_len", "32", "--device", "cpu", *flags])
        module.main()
        return capsys.readouterr().out

    return run
