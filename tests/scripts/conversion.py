"""Models and greedy answers for the tests of the export formats."""

import json
from pathlib import Path

import torch

from model import LMConfig, MiniMindLM
from model.chat import render_chat
from model.tokenizer import tokenizer_hash
from trainer.files import save_json
from trainer.weights import architecture

QUESTIONS = ("What is the capital of the green island?", "你好，请问今天的天气怎么样？", "12 + 30 = ?")


def make_model(vocab_size: int, **changes) -> MiniMindLM:
    """A small model with weights large enough for varied answers."""
    sizes = {"dim": 64, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "max_seq_len": 256, "vocab_size": vocab_size}
    torch.manual_seed(3)
    model = MiniMindLM(LMConfig(**sizes | changes)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4 if parameter.dim() == 2 else 1).add_(0.1 * torch.randn_like(parameter))
    return model


def save_model(model: MiniMindLM, tokenizer, path: Path) -> Path:
    """Save the model as a stage does: weights, and a json beside them."""
    torch.save(model.state_dict(), path)
    config = architecture(model.config) | {"max_seq_len": model.config.max_seq_len}
    about = {"config": config, "tokenizer": tokenizer_hash(tokenizer), "stage": "full_sft", "step": 7}
    save_json(about, path.with_suffix(".json"))
    return path


def prompts(tokenizer) -> list[list[int]]:
    """The prompt ids of each question."""
    return [render_chat(tokenizer, [{"role": "user", "content": q}], add_generation_prompt=True)[0] for q in QUESTIONS]


def greedy(model: MiniMindLM, ids: list[int], n: int = 24) -> list[int]:
    """The model's `n` greedy tokens, or fewer if it stops."""
    return model.generate(torch.tensor([ids]), max_new_tokens=n)[0, len(ids) :].tolist()


def copy_folder(folder, target, change: dict) -> None:
    """Copy a folder with some settings changed; None removes a setting."""
    for file in folder.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    config = json.loads((folder / "config.json").read_text()) | change
    config = {key: value for key, value in config.items() if value is not None}
    (target / "config.json").write_text(json.dumps(config))
