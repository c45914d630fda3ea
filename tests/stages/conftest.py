"""Stages for all tests of this folder."""

import pytest

from tests.stages.training import Stage


@pytest.fixture(scope="session")
def pretrain(tiny_data, tokenizer_dir) -> Stage:
    """Rows of 64 tokens, 4 per step, 6 steps per epoch, of which the last has fewer rows."""
    data = ("--data_path", tiny_data / "pretrain_hq.jsonl", "--accumulation_steps", "1")
    return Stage("train_pretrain.py", "--tokenizer", tokenizer_dir, *data)


@pytest.fixture(scope="session")
def sft(tiny_data, tokenizer_dir, tiny_out) -> Stage:
    """Starts from the weights in `tiny_out`, with rows of 128 tokens."""
    data = ("--data_path", tiny_data / "sft_mini_512.jsonl", "--max_seq_len", "128")
    return Stage(
        "train_full_sft.py", "--tokenizer", tokenizer_dir, *data, "--from_weight", tiny_out / "pretrain_32.pth"
    )
