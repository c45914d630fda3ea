"""Weights on disk: loading them strictly, saving them whole, and going on where a run stopped."""

import contextlib
import dataclasses
import json
import os
import pickle
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from model import LMConfig, MiniMindLM
from model.tokenizer import tokenizer_hash
from trainer.arguments import ROOT
from trainer.errors import UserError
from trainer.runtime import Runtime, Totals, plain_model

SHIPPED_TOKENIZER = ROOT / "model" / "minimind_tokenizer"
SCRIPT_OF_STAGE = {
    "pretrain": "train_pretrain.py",
    "full_sft": "train_full_sft.py",
    "rlhf": "train_dpo.py",
    "full_dist": "train_distillation.py",
    "reason": "train_distill_reason.py",
    "pretrain_vlm": "train_pretrain_vlm.py",
    "sft_vlm": "train_sft_vlm.py",
    "sft_vlm_multi": "train_sft_vlm.py --multi",
}
OLD_BUFFERS = ("pos_cis", "mask")  # tables that old files carry; the model computes them
ARCHITECTURE = (
    *("dim", "n_layers", "n_heads", "n_kv_heads", "vocab_size", "hidden_dim", "norm_eps", "rope_theta", "use_moe"),
    *("num_experts_per_tok", "n_routed_experts", "n_shared_experts", "norm_topk_prob"),  # these of MoE only
)


# ---------------------------------------------------------------------------------------------------- tokenizer


def load_tokenizer(folder: str | os.PathLike | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer in `folder`, or the shipped one.

    Raises:
        UserError: no tokenizer there.
    """
    folder = Path(folder or SHIPPED_TOKENIZER)
    if not (folder / "tokenizer.json").is_file():
        raise UserError(f"--tokenizer {folder}: no tokenizer.json there; scripts/train_tokenizer.py makes one")
    return AutoTokenizer.from_pretrained(str(folder), local_files_only=True)


# ------------------------------------------------------------------------------------------------ whole files only


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a name beside `path` to write to; renamed over `path` once written and flushed, deleted on any failure.

    Raises:
        UserError: it could not be written (disk full, no permission); `path` is as it was.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(
            f"cannot write {path}: {error.strerror or error}; what was saved before is whole: "
            "make room there (or choose another --out_dir) and go on with --resume"
        ) from error
    finally:
        temporary.unlink(missing_ok=True)


def save_tensors(content, path: Path) -> None:
    """`torch.save`, whole or not at all."""
    with replacing(path) as temporary, open(temporary, "wb") as file:
        try:
            torch.save(content, file)
        except RuntimeError as error:  # PyTorch's own word for a write that failed
            raise OSError(str(error).splitlines()[0]) from error


def save_json(content: dict, path: Path) -> None:
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(content, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")


def load_tensors(path: Path) -> dict:
    """`torch.load` of tensors and plain values, nothing that could run code.

    Raises:
        UserError: not such a file, or not a whole one.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise UserError(
            f"{path} holds something else than tensors, maybe code: it is refused, and was not run"
        ) from None
    except (RuntimeError, EOFError, OSError, ValueError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{path} is truncated or no checkpoint ({reason}): make or download it again") from None


# ----------------------------------------------------------------------------------------------------- weights


def weights_name(stage: str, dim: int, use_moe: bool) -> str:
    """'full_sft', 640, True -> 'full_sft_640_moe'."""
    return f"{stage}_{dim}{'_moe' if use_moe else ''}"


def weights_path(args, stage: str) -> Path:
    """Where a stage's weights lie; `stage` may be the path of a .pth itself."""
    if stage.endswith(".pth"):
        return Path(stage)
    return Path(args.out_dir) / f"{weights_name(stage, args.dim, args.use_moe)}.pth"


def config_of(args, tokenizer: PreTrainedTokenizerBase) -> LMConfig:
    """The configuration that the model flags name.

    Raises:
        UserError: they do not fit together.
    """
    try:
        return LMConfig(dim=args.dim, n_layers=args.n_layers, use_moe=args.use_moe, vocab_size=len(tokenizer))
    except ValueError as error:
        raise UserError(str(error)) from None


def read_settings(path: Path) -> dict | None:
    """What the json beside the weights says; None where there is none (a downloaded file).

    Raises:
        UserError: it is not valid JSON.
    """
    beside = path.with_suffix(".json")
    if not beside.is_file():
        return None
    try:
        return json.loads(beside.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{beside} is not valid JSON ({error}): restore it, or delete it to go by the flags") from None


def architecture(config: LMConfig) -> dict:
    """The fields that decide parameters and maths; the experts' only where there are any."""
    names = [name for name in ARCHITECTURE if config.use_moe or ("expert" not in name and name != "norm_topk_prob")]
    return {name: getattr(config, name) for name in names}


def load_weights(
    path: Path, config: LMConfig | None, tokenizer: PreTrainedTokenizerBase, missing: tuple[str, ...] = ()
) -> MiniMindLM:
    """A model with the weights in `path`, loaded strictly.

    Args:
        config: what the flags ask for; None takes the json beside the weights.
        tokenizer: must be the one the weights were trained with, by the json.
        missing: prefixes of parameters that the file may lack.

    Raises:
        UserError: missing, damaged, of another shape or another tokenizer; the message names both sides.
    """
    if not path.is_file():
        maker = SCRIPT_OF_STAGE.get(re.sub(r"_\d+(_moe)?$", "", path.stem))
        raise UserError(f"{path} is missing: " + (f"{maker} makes it" if maker else "check --out_dir and the flags"))
    settings = read_settings(path)
    if settings is not None:
        saved = LMConfig(**{k: v for k, v in settings["config"].items() if k in ARCHITECTURE or k == "max_seq_len"})
        if config is None:
            config = saved
        _compare(path, architecture(saved), architecture(config), "its json", "the flags")
        if settings["tokenizer"] != tokenizer_hash(tokenizer):
            raise UserError(
                f"{path} was trained with tokenizer {settings['tokenizer']}, and this one is "
                f"{tokenizer_hash(tokenizer)}: name the right folder with --tokenizer"
            )
    if config is None:
        raise ValueError("without a json beside the weights, a config is needed")
    state = load_tensors(path)
    if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
        raise UserError(f"{path} is no plain state dict of tensors")
    state = {key: value.float() for key, value in state.items() if key.split(".")[-1] not in OLD_BUFFERS}
    _compare(path, _shape_of(state), architecture(config), "its tensors", "the flags")
    model = MiniMindLM(config)
    try:
        result = model.load_state_dict(state, strict=not missing)
    except RuntimeError as error:
        raise UserError(f"{path} does not fit the model: {' '.join(str(error).split())[:300]}") from None
    lacking = [key for key in result.missing_keys if not key.startswith(missing)]
    if lacking or result.unexpected_keys:
        raise UserError(
            f"{path} does not fit the model: lacks {lacking[:3]}, has {result.unexpected_keys[:3]} too much"
        )
    return model


def _compare(path: Path, left: dict, right: dict, left_name: str, right_name: str) -> None:
    different = [name for name in left if name in right and left[name] != right[name]]
    if different:
        ours = ", ".join(f"{name} {left[name]}" for name in different)
        theirs = ", ".join(f"{name} {right[name]}" for name in different)
        raise UserError(f"{path} has {ours} ({left_name}), but {right_name} ask for {theirs}")


def _shape_of(state: dict[str, Tensor]) -> dict:
    """What the tensors of a state dict tell of the architecture."""
    layers = {key.split(".")[1] for key in state if key.startswith("layers.")}
    shape = {"n_layers": len(layers), "use_moe": any(".experts." in key for key in state)}
    embedding = state.get("tok_embeddings.weight")
    if embedding is not None and embedding.dim() == 2:
        shape |= {"vocab_size": embedding.size(0), "dim": embedding.size(1)}
    return shape


# ---------------------------------------------------------------------------------------------------- a run's state


@dataclasses.dataclass
class Progress:
    """How far a run is: optimizer steps, real tokens seen, seconds of training, steps skipped as not finite."""

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    skipped: int = 0

    def advance(self, totals: Totals, skipped: int) -> None:
        """Count the step just taken."""
        self.step += 1
        self.tokens += int(totals.real)
        self.skipped = skipped


class Checkpoint:
    """A stage's weights `out/NAME_D.pth`, their json, and `out/NAME_D.resume/`.

    A save writes a new folder `resume/step_N` with all that is needed to go on, then moves the pointer `resume/latest`
    to it, then replaces the .pth and its json: a crash at any instant leaves a whole state that agrees with itself.

    Raises (on construction):
        UserError: the weights are there already, and neither --resume nor --overwrite was given.
    """

    def __init__(self, args, stage: str, config: LMConfig, tokenizer: PreTrainedTokenizerBase, runtime: Runtime):
        self.path = weights_path(args, stage)
        self.folder = self.path.with_suffix(".resume")
        self.runtime = runtime
        self.resuming = args.resume
        self.settings = {
            "config": architecture(config) | {"max_seq_len": config.max_seq_len},
            "stage": stage,
            "tokenizer": tokenizer_hash(tokenizer),
            "data_path": str(args.data_path),
        }
        # what decides which rows a step takes: a run that goes on must have the same
        self.order = {
            name: getattr(args, name)
            for name in ("data_path", "batch_size", "accumulation_steps", "max_seq_len", "packing", "seed", "optimizer")
        } | {"world_size": runtime.world_size, "deepspeed": bool(args.deepspeed)}
        if self.path.exists() and not (args.resume or args.overwrite):
            raise UserError(f"{self.path} is there already: --resume goes on with that run, --overwrite replaces it")

    def save(self, model: nn.Module, optimizer, scaler, progress: Progress, metrics: dict) -> None:
        """Write everything; all ranks must call it."""
        name = f"step_{progress.step:08d}"
        folder = self.folder / f".{name}.tmp"
        with replacing_folder(folder, self.folder / name, self.runtime):
            save_tensors(self._random_state(), folder / f"rank_{self.runtime.rank}.pt")
            if self.runtime.deepspeed_config:
                model.save_checkpoint(str(folder), tag="engine")
            state = full_state_dict(model, self.runtime)
            if self.runtime.is_main:
                save_tensors(state, folder / "model.pth")
                if not self.runtime.deepspeed_config:
                    save_tensors(
                        {"optimizer": optimizer.state_dict(), "scaler": scaler.state_dict()}, folder / "optimizer.pt"
                    )
                save_json({"progress": dataclasses.asdict(progress), "order": self.order}, folder / "state.json")
        if self.runtime.is_main:
            with replacing(self.folder / "latest") as temporary:
                temporary.write_text(name, encoding="utf-8")
            with replacing(self.path) as temporary:
                shutil.copyfile(self.folder / name / "model.pth", temporary)
            save_json(
                self.settings | dataclasses.asdict(progress) | {"metrics": metrics}, self.path.with_suffix(".json")
            )
            for old in self.folder.iterdir():
                if old.is_dir() and old.name != name:
                    shutil.rmtree(old)

    def load(self, model: nn.Module, optimizer, scaler) -> Progress:
        """Continue: fill model, optimizer, scaler and random state with what was saved last; nothing saved = a start.

        Raises:
            UserError: the saved run took its rows in another order, so that it cannot be continued exactly.
        """
        pointer = self.folder / "latest"
        if not self.resuming or not pointer.is_file():
            return Progress()
        folder = self.folder / pointer.read_text(encoding="utf-8")
        state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        for name, value in self.order.items():
            if state["order"][name] != value:
                raise UserError(
                    f"--resume: the saved run had {name} {state['order'][name]}, this one has {value}; "
                    "give the same, or start anew with --overwrite"
                )
        if self.runtime.deepspeed_config:
            model.load_checkpoint(str(folder), tag="engine")
        else:
            plain_model(model).load_state_dict(load_tensors(folder / "model.pth"))
            saved = load_tensors(folder / "optimizer.pt")
            optimizer.load_state_dict(saved["optimizer"])
            scaler.load_state_dict(saved["scaler"])
        random = load_tensors(folder / f"rank_{self.runtime.rank}.pt")
        torch.set_rng_state(random["cpu"])
        if self.runtime.device.type == "cuda":
            torch.cuda.set_rng_state(random["cuda"], self.runtime.device)
        progress = Progress(**state["progress"])
        self.runtime.non_finite = progress.skipped
        self.runtime.say(f"resumed at step {progress.step} from {folder}")
        return progress

    def _random_state(self) -> dict:
        state = {"cpu": torch.get_rng_state()}
        if self.runtime.device.type == "cuda":
            state["cuda"] = torch.cuda.get_rng_state(self.runtime.device)
        return state


@contextlib.contextmanager
def replacing_folder(temporary: Path, final: Path, runtime: Runtime) -> Iterator[None]:
    """All ranks write into `temporary`; when all have, rank 0 renames it to `final`."""
    if runtime.is_main and temporary.exists():
        shutil.rmtree(temporary)
    _wait(runtime)
    try:
        temporary.mkdir(parents=True, exist_ok=True)
        yield
        _wait(runtime)
        if runtime.is_main:
            if final.exists():  # the same step, saved by an interrupted run
                shutil.rmtree(final)
            os.replace(temporary, final)
    except OSError as error:
        raise UserError(f"cannot write {final}: {error.strerror or error}; what was saved before is whole") from error
    finally:
        if runtime.is_main:
            shutil.rmtree(temporary, ignore_errors=True)


def _wait(runtime: Runtime) -> None:
    if runtime.world_size > 1:
        dist.barrier()


def full_state_dict(model: nn.Module, runtime: Runtime) -> dict[str, Tensor]:
    """Every parameter whole, fp32, on the CPU, under its plain name (all ranks must call it; ZeRO-3 gathers)."""
    plain = plain_model(model)
    if not runtime.deepspeed_config:
        return {key: value.detach().float().cpu() for key, value in plain.state_dict().items()}
    import deepspeed

    with deepspeed.zero.GatheredParameters(list(plain.parameters())):
        return {key: value.detach().float().cpu().clone() for key, value in plain.state_dict().items()}
