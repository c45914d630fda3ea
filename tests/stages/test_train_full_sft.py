"""train_full_sft.py, run for real."""

from model.tokenizer import tokenizer_hash
from trainer.weights import load_weights, read_settings


def test_the_weights_of_both_stages_load_strictly(tiny_out, tiny_tokenizer):
    for stage in ("pretrain", "full_sft"):
        path = tiny_out / f"{stage}_32.pth"
        assert load_weights(path, None, tiny_tokenizer).config.dim == 32
        settings = read_settings(path)
        assert settings["step"] == 4
        assert settings["stage"] == stage
        assert settings["tokenizer"] == tokenizer_hash(tiny_tokenizer)
