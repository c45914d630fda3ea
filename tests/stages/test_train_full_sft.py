"""train_full_sft.py, run for real."""

import pytest

from model.tokenizer import tokenizer_hash
from tests.stages.training import about, distance, losses, weights
from trainer.weights import load_weights, read_settings


def test_the_weights_of_both_stages_load_strictly(tiny_out, tiny_tokenizer):
    for stage in ("pretrain", "full_sft"):
        path = tiny_out / f"{stage}_32.pth"
        assert load_weights(path, None, tiny_tokenizer).config.dim == 32
        settings = read_settings(path)
        assert settings["step"] == 4
        assert settings["stage"] == stage
        assert settings["tokenizer"] == tokenizer_hash(tiny_tokenizer)


def test_it_learns_to_answer(sft, tmp_path):
    done = sft(tmp_path, "--epochs", "6")
    assert "40 samples" in done.stdout
    assert losses(tmp_path, "full_sft_32")[-1] < losses(tmp_path, "full_sft_32")[0] - 0.2
    assert about(tmp_path, "full_sft_32")["stage"] == "full_sft"


def test_a_step_is_the_same_however_it_is_cut_up(sft, tmp_path):
    """Rows have from a few to a hundred target tokens, and every token has the same weight."""
    name, flags = "full_sft_32", ("--epochs", "2", "--packing", "0")
    sft(tmp_path / "whole", *flags, "--batch_size", "12")
    for how, processes in ((("3", "--accumulation_steps", "4"), 1), (("3", "--accumulation_steps", "2"), 2)):
        out = tmp_path / str(processes)
        sft(out, *flags, "--batch_size", *how, processes=processes)
        assert losses(out, name) == pytest.approx(losses(tmp_path / "whole", name), abs=1e-5)
        assert distance(weights(out, name), weights(tmp_path / "whole", name)) < 1e-5


def test_quantization_aware_training_learns_weights_that_int4_can_hold(sft, tmp_path):
    """Its loss is computed with the rounded weights, and its file contains the exact ones under the usual names."""
    sft(tmp_path / "exact", "--learning_rate", "1e-9", "--max_steps", "1")
    sft(tmp_path / "aware", "--learning_rate", "1e-9", "--max_steps", "1", "--qat", "int4")
    exact, aware = losses(tmp_path / "exact", "full_sft_32")[0], losses(tmp_path / "aware", "full_sft_32")[0]
    assert exact != aware
    assert aware == pytest.approx(exact, abs=0.05)
    saved = weights(tmp_path / "aware", "full_sft_32")
    assert distance(saved, weights(tmp_path / "exact", "full_sft_32")) < 1e-6
    done = sft(tmp_path / "aware", "--max_steps", "2", "--resume", exit_code=2)
    assert "qat" in done.stderr
