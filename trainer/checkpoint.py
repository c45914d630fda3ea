"""Saving a run whole, and going on where it stopped."""

import contextlib
import dataclasses
import fcntl
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from transformers import PreTrainedTokenizerBase

from dataset.lm_dataset import RowDataset
from model import LMConfig
from model.tokenizer import tokenizer_hash
from trainer.engine import full_state_dict, plain_model
from trainer.errors import UserError
from trainer.files import cannot_write, load_tensors, replacing, save_json, save_tensors, writing_tensors
from trainer.runtime import Runtime, Totals
from trainer.weights import architecture, weights_path

# A run that goes on must have every setting that it had, except these that change no number…
FREE = (
    *("out_dir", "device", "num_workers", "log_interval", "save_interval", "eval_interval", "eval_path", "resume"),
    *("overwrite", "compile", "gradient_checkpointing", "use_wandb", "wandb_project", "local_rank", "ddp"),
    *("data_path", "images_path", "cache_limit"),  # what the data holds is compared, not where it lies
    *("dim", "n_layers", "use_moe", "tokenizer"),  # the architecture and the tokenizer's hash say it better
)
SAID = ("epochs", "max_steps", "learning_rate", "warmup_iters", "grad_clip", "dtype")  # …and these, when it is said


@dataclasses.dataclass
class Progress:
    """How far a run is: optimizer steps, real tokens seen, seconds of training, steps skipped as not finite."""

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    skipped: int = 0

    def __post_init__(self):
        self._counted_at = time.monotonic()

    def advance(self, totals: Totals, skipped: int) -> None:
        """Count the step just taken."""
        now = time.monotonic()
        self.step += 1
        self.tokens += int(totals.real)
        self.seconds += now - self._counted_at
        self.skipped = skipped
        self._counted_at = now


class Checkpoint:
    """A stage's weights `out/NAME_D.pth`, their json, and `out/NAME_D.resume/`, which only one run at a time may write.

    A save writes a new folder in `resume/` with all that is needed to go on, moves the pointer `resume/latest` to it,
    and copies its weights and their json to where people look for them: a crash at any instant leaves a whole state,
    and a run that goes on from it mends the copies.

    Args:
        keep: which of the model's keys are saved (an adapter's, say); the others are as the stage loaded them.
        facts: what else is to be known of the stage (a LoRA's rank, a DPO's beta), as JSON values: they go into the
            json, and a run that is resumed must have the same.

    Raises (on construction):
        UserError: there is an earlier run, and neither --resume nor --overwrite was given, or nothing to go on from;
            another run is writing there; nothing can be written there.
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
        self.pointer = self.folder / "latest"
        self.runtime = runtime
        self.keep = keep
        self.resuming = args.resume
        self.about = {
            "config": architecture(config) | {"max_seq_len": config.max_seq_len},
            "stage": stage,
            "tokenizer": tokenizer_hash(tokenizer),
            "data_path": str(args.data_path),
            **facts,
        }
        self.settings = {name: value for name, value in vars(args).items() if name not in FREE} | {
            "deepspeed": bool(args.deepspeed),
            "zero_stage": (runtime.deepspeed_config or {}).get("zero_optimization", {}).get("stage", 0),
            "world_size": runtime.world_size,
            "held out of data_path": bool(args.eval_interval) and not args.eval_path,
            "tokenizer": self.about["tokenizer"],
            **architecture(config),
            **facts,
        }
        if args.max_seq_len > config.max_seq_len:
            raise UserError(f"--max_seq_len {args.max_seq_len}: the model takes at most {config.max_seq_len} tokens")
        if args.resume and self.path.exists() and not self.pointer.is_file():
            raise UserError(
                f"{self.path} is there, but nothing in {self.folder} to go on from: --overwrite replaces it"
            )
        if not (args.resume or args.overwrite) and (self.path.exists() or self.pointer.is_file()):
            raise UserError(f"{self.path} is there already: --resume goes on with that run, --overwrite replaces it")
        if runtime.is_main:
            self._lock = self._locked()

    def _locked(self):
        """The open file whose lock keeps a second run away; it ends with this process."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            file = open(self.folder / "lock", "a+", encoding="utf-8")  # noqa: SIM115 - open as long as the run
        except OSError as error:
            raise cannot_write(self.folder, error) from error
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            file.seek(0)
            raise UserError(f"{self.path} is being written by another run (process {file.read().strip()})") from None
        except OSError:
            return file  # a file system that has no locks
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        return file

    def save(self, model: nn.Module, optimizer, scaler, progress: Progress, metrics: dict) -> None:
        """Write everything; all ranks must call it.

        Raises:
            UserError: it could not be written; what was saved before is whole.
        """
        run = self.runtime
        weights = full_state_dict(model, run, self.keep)
        with self._new_folder(f"step_{progress.step:08d}") as folder:
            save_tensors(self._random_state(), folder / f"rank_{run.rank}.pt")
            if run.deepspeed_config:
                with writing_tensors():
                    model.save_checkpoint(str(folder), tag="engine")
            if run.is_main:
                save_tensors(weights, folder / "model.pth")
                save_json(self.about | dataclasses.asdict(progress) | {"metrics": metrics}, folder / "model.json")
                state = {"scaler": scaler.state_dict()}
                if not run.deepspeed_config:
                    state["optimizer"] = optimizer.state_dict()
                save_tensors(state, folder / "optimizer.pt")
                save_json({"progress": dataclasses.asdict(progress), "settings": self.settings}, folder / "state.json")

    @contextlib.contextmanager
    def _new_folder(self, name: str) -> Iterator[Path]:
        """A folder that all ranks write into; when all have, it becomes the one to go on from."""
        run, temporary, final = self.runtime, self.folder / ".saving", self.folder / name
        try:
            if run.is_main and temporary.exists():
                shutil.rmtree(temporary)
            _wait(run)
            temporary.mkdir(parents=True, exist_ok=True)
            yield temporary
            _wait(run)
            if not run.is_main:
                return
            while final.exists():  # the run that this one replaces stopped at the same step
                final = final.with_name(final.name + "_")
            os.replace(temporary, final)
            with replacing(self.pointer) as pointer:
                pointer.write_text(final.name, encoding="utf-8")
            self._publish(final)
            self._tidy(final)
        except OSError as error:
            raise cannot_write(final, error) from error
        finally:
            if run.is_main and temporary.exists():
                shutil.rmtree(temporary)

    def _tidy(self, current: Path) -> None:
        """Delete older states, and what a killed run was writing."""
        for left in (*self.folder.iterdir(), *self.path.parent.iterdir()):
            if left.parent == self.folder and left.is_dir() and left != current:
                shutil.rmtree(left)
            elif left.name.endswith(".tmp") and left.name.startswith((f".{self.path.stem}.", f".{self.pointer.name}.")):
                left.unlink()

    def _publish(self, folder: Path) -> None:
        """Copy weights and json to where people look for them."""
        for name, path in (("model.pth", self.path), ("model.json", self.path.with_suffix(".json"))):
            with replacing(path) as temporary:
                shutil.copyfile(folder / name, temporary)

    def load(self, model: nn.Module, optimizer, scaler, dataset: RowDataset | None = None) -> Progress:
        """Continue: fill model, optimizer, scaler and random state with what was saved last; nothing saved = a start.

        From here on Ctrl-C and SIGTERM save first.

        Args:
            dataset: what the run learns from; it must hold what it held.

        Raises:
            UserError: the saved run had other settings or data, so that it cannot be continued exactly; or it is
                damaged.
        """
        progress = Progress()
        if dataset is not None:
            self.settings["data"] = dataset.identity
        if self.resuming and self.pointer.is_file():
            folder = self.folder / self.pointer.read_text(encoding="utf-8").strip()
            try:
                state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
                then = state["settings"].pop("data", {})  # none by earlier versions
                if dataset is not None and (change := dataset.changed_since(then)):
                    raise UserError(f"--resume: {change}; or start anew with --overwrite")
                self._compare(state["settings"])
                self._restore(folder, model, optimizer, scaler)
                progress = Progress(**state["progress"])
                if self.runtime.is_main:
                    self._mend(folder)
            except (OSError, LookupError, TypeError, ValueError, RuntimeError) as error:
                reason = " ".join(str(error).split())[:200]
                raise UserError(
                    f"{folder} cannot be continued ({type(error).__name__}: {reason}): --overwrite starts anew"
                ) from error
            self.runtime.non_finite = progress.skipped
            self.runtime.say(f"resumed at step {progress.step} from {folder}")
        self.runtime.catch_signals()
        return progress

    def _mend(self, folder: Path) -> None:
        """Put right what a crash between the parts of a save left."""
        beside = self.path.with_suffix(".json")
        saved = (folder / "model.json").read_bytes()
        if not self.path.exists() or not beside.is_file() or beside.read_bytes() != saved:
            self._publish(folder)
        self._tidy(folder)

    def _compare(self, saved: dict) -> None:
        """Refuse to go on with settings that give other numbers; say those that the user may want to change."""
        for name, ours in self.settings.items():
            theirs = saved.get(name, ours)
            if theirs == ours:
                continue
            if name not in SAID:
                raise UserError(
                    f"--resume: the saved run had {name} {theirs}, this one has {ours}; "
                    "give the same, or start anew with --overwrite"
                )
            self.runtime.say(f"--resume: {name} was {theirs} and is {ours} from now on")

    def _restore(self, folder: Path, model: nn.Module, optimizer, scaler) -> None:
        state = load_tensors(folder / "optimizer.pt")
        if state["scaler"]:  # float16 had one; a run that goes on in it from another dtype begins with its own
            scaler.load_state_dict(state["scaler"])
        if self.runtime.deepspeed_config:
            if model.load_checkpoint(str(folder), tag="engine")[0] is None:
                raise ValueError("DeepSpeed finds none of its files there")
        else:
            plain = plain_model(model)
            given = {key: value for key, value in plain.state_dict().items() if not self.keep(key)}
            plain.load_state_dict(given | load_tensors(folder / "model.pth"))
            optimizer.load_state_dict(state["optimizer"])
        random = load_tensors(folder / f"rank_{self.runtime.rank}.pt")
        torch.set_rng_state(random["cpu"])
        if self.runtime.device.type == "cuda" and "cuda" in random:
            torch.cuda.set_rng_state(random["cuda"], self.runtime.device)

    def _random_state(self) -> dict:
        state = {"cpu": torch.get_rng_state()}
        if self.runtime.device.type == "cuda":
            state["cuda"] = torch.cuda.get_rng_state(self.runtime.device)
        return state


def _wait(runtime: Runtime) -> None:
    if runtime.world_size > 1:
        dist.barrier(device_ids=[runtime.device.index] if runtime.device.type == "cuda" else None)
