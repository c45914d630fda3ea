"""All training scripts, each with flags that make it run in a second, for the tests of their common loop."""

import dataclasses
from pathlib import Path

import torch
from PIL import Image

from model import LMConfig, MiniMindLM
from model.images import image_token_id
from model.model_vlm import MiniMindVLM, VLMConfig
from tests.conftest import write_jsonl
from tests.running import TINY_TRAINING, call_script, run_script

STUDENT = {"dim": 32, "n_layers": 2}
COLOURS = {"red": (255, 0, 0), "green": (0, 160, 0), "blue": (0, 0, 255)}
WORDS = "The little robot counts seven yellow birds above the sea and then it counts them all again".split()


@dataclasses.dataclass(frozen=True)
class Script:
    """A training script.

    Attributes:
        name: of the weights that it writes, without size and suffix.
        data: the name of its data among the files that `make_world` writes.
        flags: those that it needs in addition to the common ones.
    """

    path: str
    name: str
    data: str
    flags: tuple[str, ...] = ()


SCRIPTS = (
    Script("train_pretrain.py", "pretrain", "texts.jsonl"),
    Script("train_full_sft.py", "full_sft", "chats.jsonl"),
    Script("train_lora.py", "lora/tiny", "chats.jsonl", ("--lora_name", "tiny", "--rank", "4")),
    Script("train_dpo.py", "rlhf", "pairs.jsonl"),
    Script("train_distillation.py", "full_dist", "chats.jsonl", ("--teacher_weight", "teacher.pth", "--alpha", "0.3")),
    Script("train_distill_reason.py", "reason", "thoughts.jsonl"),
    Script("train_pretrain_vlm.py", "pretrain_vlm", "pictures.jsonl", ("--unfreeze_last", "1")),
    Script("train_sft_vlm.py", "sft_vlm", "pictures.jsonl"),
)


class World:
    """A folder with data, images and weights to start from; each run gets its own --out_dir.

    Args:
        folder: as `make_world` filled it.
    """

    def __init__(self, folder: Path):
        self.folder = folder

    def flags(self, script: Script, out: Path, use_moe: bool = False) -> tuple:
        """Micro-batches of 8 rows and 5 steps; the third has fewer rows, the fourth begins a new epoch."""
        out.mkdir(parents=True, exist_ok=True)
        for start in self.folder.glob("*.pth"):
            if start.name != f"{script.name}_32{'_moe' * use_moe}.pth" and not (out / start.name).exists():
                (out / start.name).symlink_to(start)
        named = tuple(str(self.folder / flag) if flag.endswith(".pth") else flag for flag in script.flags)
        if "vlm" in script.path:
            named += ("--vision_model", self.folder / "clip", "--images_path", self.folder / "images")
        return (
            *(*TINY_TRAINING, "--out_dir", out, "--tokenizer", self.folder / "tokenizer"),
            *("--data_path", self.folder / script.data, "--max_seq_len", "128", "--use_moe", str(int(use_moe))),
            *("--batch_size", "8", "--accumulation_steps", "1", "--epochs", "9", "--max_steps", "5"),
            *("--learning_rate", "1e-3", "--packing", "0", *named),
        )

    def call(self, script: Script, out: Path, *flags, use_moe: bool = False, **how) -> "Run":
        """Run a script in this process, see `call_script`."""
        call_script(script.path, *self.flags(script, out, use_moe), *flags, **how)
        return Run(out, script.name + "_32" + "_moe" * use_moe)

    def start(self, script: Script, out: Path, *flags, use_moe: bool = False, by: tuple = (), **how):
        """Run a script in its own processes, see `run_script`; `by` is a script that runs it."""
        first, *others = (*by, script.path)
        return run_script(first, *others, *self.flags(script, out, use_moe), *flags, **how)


@dataclasses.dataclass
class Run:
    """The result of a run: its --out_dir, and the name of its weights there."""

    out: Path
    name: str


def make_world(folder: Path, tokenizer, clip_dir: Path) -> World:
    """20 samples of unequal length for each kind of data, and random weights without a json, as if downloaded."""
    said = [" ".join(WORDS[: 2 + n * 7 % 15]) for n in range(20)]  # neighbours differ in their target tokens
    asked = [f"What is {n} + {n}?" + " Think." * (n % 4) for n in range(20)]
    thoughts = [f"<think>\n{text}\n</think>\n<answer>\n{n}\n</answer>" for n, text in enumerate(said)]
    write_jsonl(folder / "texts.jsonl", [{"text": f"{n}. {text}"} for n, text in enumerate(said)])
    write_jsonl(folder / "chats.jsonl", [{"conversations": _chat(*turns)} for turns in zip(asked, said, strict=True)])
    write_jsonl(
        folder / "thoughts.jsonl", [{"conversations": _chat(*turns)} for turns in zip(asked, thoughts, strict=True)]
    )
    pairs = [
        {"chosen": _chat(question, text), "rejected": _chat(question, f"No. {text[::-1]}"[: 4 + n % 9])}
        for n, (question, text) in enumerate(zip(asked, said, strict=True))
    ]
    write_jsonl(folder / "pairs.jsonl", pairs)
    _draw_pictures(folder, said)
    (folder / "clip").symlink_to(clip_dir)
    tokenizer.save_pretrained(folder / "tokenizer")

    torch.manual_seed(0)
    sizes = {"vocab_size": len(tokenizer)}
    for use_moe in (False, True):
        end = "_32_moe.pth" if use_moe else "_32.pth"
        state = MiniMindLM(LMConfig(**STUDENT, **sizes, use_moe=use_moe)).state_dict()
        for stage in ("pretrain", "full_sft", "rlhf"):
            torch.save(state, folder / f"{stage}{end}")
        config = VLMConfig(**STUDENT, **sizes, use_moe=use_moe, image_token_id=image_token_id(tokenizer))
        torch.save(MiniMindVLM(config, vision_model=clip_dir).state_dict(), folder / f"pretrain_vlm{end}")
    torch.save(MiniMindLM(LMConfig(dim=48, n_layers=1, **sizes)).state_dict(), folder / "teacher.pth")
    return World(folder)


def _draw_pictures(folder: Path, said: list[str]) -> None:
    (folder / "images").mkdir()
    for name, colour in COLOURS.items():
        Image.new("RGB", (40, 32), colour).save(folder / "images" / f"{name}.png")
    lines = []
    for n, text in enumerate(said):
        seen = [f"{list(COLOURS)[(n + k) % 3]}.png" for k in range(n % 3)]  # none, one or two
        lines.append({"image": seen, "conversations": _chat("<image>\n" * len(seen) + "What is it?", text)})
    write_jsonl(folder / "pictures.jsonl", lines)


def _chat(question: str, answer: str) -> list[dict]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
