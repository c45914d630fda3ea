"""Every training stage at a tiny size: data and weights with which sixteen steps take a second."""

import json
from dataclasses import dataclass
from pathlib import Path

import torch

from model import LMConfig, MiniMindLM
from model.images import image_token_id
from model.model_vlm import MiniMindVLM, VLMConfig
from trainer.weights import load_tokenizer

STEPS, SAVE_INTERVAL = 16, 4
COMMON = (
    *("--dim", "32", "--n_layers", "2", "--device", "cpu", "--dtype", "float32", "--compile", "0", "--packing", "0"),
    *("--max_seq_len", "96", "--accumulation_steps", "1", "--epochs", "99", "--max_steps", str(STEPS)),
    *("--save_interval", str(SAVE_INTERVAL), "--log_interval", "1", "--eval_interval", "0", "--warmup_iters", "2"),
    *("--learning_rate", "1e-3"),
)
ROWS = 4  # of a step
COLOURS = {"red": (255, 0, 0), "green": (0, 160, 0), "blue": (0, 0, 255)}
TRYING = ("--rewards", "repetition:1", "language:1", "--max_new_tokens", "12")  # rules that random weights can meet
WORDS = "The little robot counts seven yellow birds above the sea and then it counts them all again".split()


@dataclass(frozen=True)
class Stage:
    """A training script.

    Attributes:
        written: its weights' name, without size and suffix.
        data: its data among the files that `make_world` writes.
        start: the weights that it starts from.
    """

    script: str
    written: str
    data: str
    start: str | None
    flags: tuple[str, ...] = ()


STAGES = (
    Stage("train_pretrain.py", "pretrain", "texts.jsonl", None),
    Stage("train_full_sft.py", "full_sft", "chats.jsonl", "start.pth"),
    Stage("train_lora.py", "lora/tiny", "chats.jsonl", "start.pth", ("--lora_name", "tiny", "--rank", "4")),
    Stage("train_dpo.py", "rlhf", "pairs.jsonl", "start.pth"),
    Stage("train_distillation.py", "full_dist", "chats.jsonl", "start.pth", ("--teacher_weight", "teacher.pth")),
    Stage("train_distill_reason.py", "reason", "thoughts.jsonl", "start.pth"),
    Stage("train_reward.py", "reward", "pairs.jsonl", "start.pth"),
    Stage("train_grpo.py", "grpo", "problems.jsonl", "start.pth", ("--group_size", "4", *TRYING)),
    Stage("train_ppo.py", "ppo", "problems.jsonl", "start.pth", TRYING),
    Stage("train_pretrain_vlm.py", "pretrain_vlm", "pictures.jsonl", "start.pth", ("--unfreeze_last", "1")),
    Stage("train_sft_vlm.py", "sft_vlm", "pictures.jsonl", "start_vlm.pth"),
)


class World:
    """The folder that `make_world` has filled."""

    def __init__(self, folder: Path):
        self.folder = folder

    def flags(self, stage: Stage, out: Path, processes: int, data: Path | None = None) -> list[str]:
        """The flags of a stage's script with which the processes share a step's rows."""
        named = [str(self.folder / flag) if flag.endswith(".pth") else flag for flag in stage.flags]
        if stage.start:
            named += ["--from_weight", str(self.folder / stage.start)]
        if "vlm" in stage.script:
            named += ["--vision_model", str(self.folder / "clip"), "--images_path", str(self.folder / "images")]
        data = data or self.folder / stage.data
        rows = str(ROWS // processes)
        return [*COMMON, "--batch_size", rows, "--out_dir", str(out), "--data_path", str(data), *named]


def make_world(folder: Path) -> World:
    """20 samples of each kind of data, images, a CLIP, and random weights as if downloaded."""
    from transformers import CLIPConfig, CLIPModel

    (folder / "images").mkdir(parents=True)
    said = [" ".join(WORDS[: 2 + n * 7 % 15]) for n in range(20)]
    asked = [f"What is {n} + {n}?" for n in range(20)]
    _write(folder / "problems.jsonl", [{"question": text, "answer": 2 * n} for n, text in enumerate(asked)])
    thoughts = [f"<think>\n{text}\n</think>\n<answer>\n{n}\n</answer>" for n, text in enumerate(said)]
    _write(folder / "texts.jsonl", [{"text": f"{n}. {text}"} for n, text in enumerate(said)])
    _write(folder / "chats.jsonl", [_chat(*turns) for turns in zip(asked, said, strict=True)])
    _write(folder / "thoughts.jsonl", [_chat(*turns) for turns in zip(asked, thoughts, strict=True)])
    pairs = [
        {
            "chosen": _chat(question, text)["conversations"],
            "rejected": _chat(question, f"No. {text[::-1]}")["conversations"],
        }
        for question, text in zip(asked, said, strict=True)
    ]
    _write(folder / "pairs.jsonl", pairs)
    _draw_pictures(folder, said)

    tokenizer = load_tokenizer()
    sizes = {"dim": 32, "n_layers": 2, "vocab_size": len(tokenizer)}
    torch.manual_seed(0)
    half = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = half | {"vocab_size": 99, "max_position_embeddings": 16, "bos_token_id": 97, "eos_token_id": 98}
    clip = CLIPModel(CLIPConfig(text_config=text, vision_config=half | {"image_size": 32, "patch_size": 16}))
    clip.save_pretrained(folder / "clip")
    config = VLMConfig(**sizes, image_token_id=image_token_id(tokenizer))
    for name, model in (
        ("start", MiniMindLM(LMConfig(**sizes))),
        ("teacher", MiniMindLM(LMConfig(dim=48, n_layers=1, vocab_size=len(tokenizer)))),
        ("start_vlm", MiniMindVLM(config, vision_model=folder / "clip")),
    ):
        torch.save(model.state_dict(), folder / f"{name}.pth")
    return World(folder)


def _draw_pictures(folder: Path, said: list[str]) -> None:
    from PIL import Image

    for name, colour in COLOURS.items():
        Image.new("RGB", (40, 32), colour).save(folder / "images" / f"{name}.png")
    lines = []
    for n, text in enumerate(said):
        seen = [f"{list(COLOURS)[(n + k) % 3]}.png" for k in range(n % 3)]  # none, one or two
        lines.append({"image": seen} | _chat("<image>\n" * len(seen) + "What is it?", text))
    _write(folder / "pictures.jsonl", lines)


def _chat(question: str, answer: str) -> dict:
    return {"conversations": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def _write(path: Path, records: list[dict]) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
