"""Finds the models in an out folder."""

from dataclasses import dataclass
from pathlib import Path

from scripts.demo.settings import DATA, OUT
from trainer.errors import UserError
from trainer.files import file_hash
from trainer.weights import SIZE_IN_NAME, read_settings

ORDER = (  # as they are trained
    *("pretrain", "full_sft", "rlhf", "lora", "full_dist", "reason", "reward", "grpo", "ppo"),
    *("pretrain_vlm", "sft_vlm", "sft_vlm_multi"),
)
SUFFIXES = (".pth", ".safetensors")  # of two files by one name the first is taken, as everywhere


@dataclass(frozen=True)
class Found:
    """A file of weights.

    Attributes:
        name: its name in the folder: "full_sft_512", "lora/identity_512".
        about: the json beside it; empty for a downloaded file.
        problem: the reason why the json could not be read.
    """

    name: str
    path: Path
    about: dict
    problem: str | None = None

    @property
    def stage(self) -> str:
        """The stage by the file's name, such as "full_sft"; "lora" for adapters; for other names the name itself."""
        size = SIZE_IN_NAME.fullmatch(self.name)
        return "lora" if self.name.startswith("lora/") else size["stage"] if size else self.name

    @property
    def is_adapter(self) -> bool:
        return self.stage == "lora"

    @property
    def chats(self) -> bool:
        """Whether it is a chat model; a pretrained model only continues text."""
        return self.stage != "pretrain"

    @property
    def base(self) -> Path:
        """The weights that an adapter belongs to.

        Raises:
            UserError: its json does not name them, or there is no json.
        """
        base = self.about.get("base")
        if not isinstance(base, str):
            raise UserError(f"{self.path}: no json beside it says which weights the adapter belongs to")
        return self.path.parent.parent / base

    @property
    def is_of_the_demo(self) -> bool:
        """Whether it was trained on the demo's data, so that the demo's questions apply."""
        data = self.about.get("data_path")
        learned = isinstance(data, str) and Path(data).resolve().parent == DATA.resolve()
        return learned or self.path.is_relative_to(OUT.resolve())

    def hash(self) -> str:
        """Identifies these weights; for an adapter together with those of its base.

        Raises:
            UserError: as in `base`; the base is missing.
        """
        if not self.is_adapter:
            return file_hash(self.path)
        if not self.base.is_file():
            raise UserError(f"{self.path}: its base {self.base} is missing")
        return f"{file_hash(self.path)}+{file_hash(self.base)}"


def find_stages(out_dir: Path) -> list[Found]:
    """The models in a folder and in its lora/, in the order of training, small ones first.

    Raises:
        UserError: it is not a folder, or has no weights.
    """
    out_dir = out_dir.resolve()
    if not out_dir.is_dir():
        raise UserError(f"--out_dir {out_dir} is not a folder")
    files = {}
    for suffix in SUFFIXES:
        for path in [*out_dir.glob(f"*{suffix}"), *out_dir.glob(f"lora/*{suffix}")]:
            if path.is_file() and not path.name.startswith("."):  # which a save was writing
                files.setdefault(path.relative_to(out_dir).with_suffix("").as_posix(), path)
    if not files:
        raise UserError(f"{out_dir} has no weights (*.pth): train a stage, or name another folder with --out_dir")
    return sorted((found_at(path, name) for name, path in files.items()), key=_place)


def found_at(path: Path, name: str) -> Found:
    """A file of weights with the json beside it."""
    try:
        return Found(name, path, read_settings(path) or {})
    except UserError as error:
        return Found(name, path, {}, str(error))


def _place(found: Found) -> tuple:
    place = ORDER.index(found.stage) if found.stage in ORDER else len(ORDER)
    size = SIZE_IN_NAME.fullmatch(found.name)
    return place, found.stage, int(size["dim"]) if size else 0, found.name
