"""Saving a run whole, and going on where it stopped."""

import contextlib
import dataclasses
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from model import LMConfig
from model.tokenizer import tokenizer_hash
from trainer.errors import UserError
from trainer.files import load_tensors, replacing, save_json, save_tensors
from trainer.runtime import Runtime, Totals, plain_model
from trainer.weights import architecture, weights_path

# The flags that decide which rows a step takes, and what it makes of them: a run that goes on must have the same.
ORDER = ("data_path", "batch_size", "accumulation_steps", "max_seq_len", "packing", "seed", "optimizer")


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

    Args:
        keep: which of the model's keys are saved (an adapter's, say); the others are as the stage loaded them.
        facts: what else decides the stage's numbers (a LoRA's rank, a DPO's beta), as JSON values: they go into the
            json, and a run that is resumed must have the same.

    Raises (on construction):
        UserError: the weights are there already, and neither --resume nor --overwrite was given.
    """

    def __init__(
        self,
        args,
        stage: str,
        config: LMConfig,
        tokenizer: PreTrainedTokenizerBase,
        runtime: Runtime,
        keep: Callable[[str], bool] = lambda key: True,
        **facts,
    ):
        self.path = weights_path(args, stage)
        self.folder = self.path.with_suffix(".resume")
        self.runtime = runtime
        self.keep = keep
        self.resuming = args.resume
        self.settings = {
            "config": architecture(config) | {"max_seq_len": config.max_seq_len},
            "stage": stage,
            "tokenizer": tokenizer_hash(tokenizer),
            "data_path": str(args.data_path),
        } | facts
        self.order = {name: getattr(args, name) for name in ORDER} | facts
        self.order |= {"world_size": runtime.world_size, "deepspeed": bool(args.deepspeed)}
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
            state = full_state_dict(model, self.runtime, self.keep)
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
            UserError: the saved run had other settings, so that it cannot be continued exactly.
        """
        pointer = self.folder / "latest"
        if not self.resuming or not pointer.is_file():
            return Progress()
        folder = self.folder / pointer.read_text(encoding="utf-8")
        state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        for name, value in self.order.items():
            if state["order"].get(name) != value:
                raise UserError(
                    f"--resume: the saved run had {name} {state['order'].get(name)}, this one has {value}; "
                    "give the same, or start anew with --overwrite"
                )
        if self.runtime.deepspeed_config:
            model.load_checkpoint(str(folder), tag="engine")
        else:
            plain = plain_model(model)
            given = {key: value for key, value in plain.state_dict().items() if not self.keep(key)}
            plain.load_state_dict(given | load_tensors(folder / "model.pth"))
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


def full_state_dict(model: nn.Module, runtime: Runtime, keep: Callable[[str], bool]) -> dict[str, Tensor]:
    """Each parameter that `keep` names, whole, fp32, on the CPU, under its plain name.

    All ranks must call it: ZeRO-3 gathers.
    """
    plain = plain_model(model)
    if not runtime.deepspeed_config:
        return {key: value.detach().float().cpu() for key, value in plain.state_dict().items() if keep(key)}
    import deepspeed

    with deepspeed.zero.GatheredParameters(list(plain.parameters())):
        return {key: value.detach().float().cpu().clone() for key, value in plain.state_dict().items() if keep(key)}
