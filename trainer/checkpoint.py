"""Saving a run whole, and going on where it stopped."""

import contextlib
import dataclasses
import json
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch.distributed as dist
from torch import nn
from transformers import PreTrainedTokenizerBase

from dataset.lm_dataset import RowDataset
from model import LMConfig
from model.tokenizer import tokenizer_hash
from trainer.architecture import architecture, positions
from trainer.device import device_ids, random_state, set_random_state
from trainer.errors import UserError
from trainer.files import (
    file_hash,
    flush_to_disk,
    left_by_a_kill,
    load_tensors,
    move,
    replacing,
    save_json,
    save_tensors,
    write_error,
    writing_tensors,
)
from trainer.parallel import full_state_dict, plain_model, require_same_weights
from trainer.resume_files import damaged, last_saved, read_object, seal, unseal
from trainer.run_lock import lock_run, read_owner
from trainer.runtime import Runtime, Totals
from trainer.weights import weights_path

# A run that goes on must have every setting that it had, except these that change no number…
MAY_CHANGE = (
    *("out_dir", "device", "num_workers", "log_interval", "save_interval", "eval_interval", "eval_path", "resume"),
    *("overwrite", "compile", "gradient_checkpointing", "tracker", "use_wandb", "wandb_project", "local_rank", "ddp"),
    *("data_path", "mix", "images_path", "cache_limit"),  # what the data holds is compared, not where it lies
    *("dim", "n_layers", "use_moe", "tokenizer"),  # the architecture and the tokenizer's hash say it better,
    *("generation", "num_experts_per_tok", "rope_theta", "rope_scaling", "inference_rope_scaling"),  # and of these
)
MAY_CHANGE_WITH_NOTICE = (
    "epochs",
    "max_steps",
    "learning_rate",
    "warmup_iters",
    "grad_clip",
    "dtype",
)  # …and these, when it is said
SKIPPED_LIMIT = 10  # steps in a row; float16's scaler needs a few of them to find its scale


@dataclasses.dataclass
class Progress:
    """Progress of a run: optimizer steps, non-padding tokens seen, seconds of training, steps skipped as not finite."""

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    skipped: int = 0

    def __post_init__(self):
        self._counted_at = time.monotonic()
        self._skipped_in_a_row = 0

    def advance(self, totals: Totals, skipped: bool) -> None:
        """Count the step just taken, or `skipped` because its loss or gradient was not finite.

        Raises:
            UserError: after several in a row that were skipped.
        """
        now = time.monotonic()
        self.step += 1
        self.tokens += int(totals.non_padding_tokens)
        self.seconds += now - self._counted_at
        self._counted_at = now
        if not skipped:
            self._skipped_in_a_row = 0
            return
        self.skipped += 1
        self._skipped_in_a_row += 1
        if self._skipped_in_a_row >= SKIPPED_LIMIT:
            raise UserError(
                f"loss or gradient was not finite {SKIPPED_LIMIT} times in a row; the last checkpoint is intact: "
                "continue from it with --resume and a lower --learning_rate, or another --dtype"
            )


class Checkpoint:
    """A stage's weights `out/NAME_D.pth`, their json, and `out/NAME_D.resume/`, which only one run at a time may write.

    A save writes a new folder in `resume/` with all that is needed to resume, moves the pointer `resume/latest` to it,
    and copies its weights and their json to their usual place: a crash at any moment leaves a complete state,
    and a run that resumes from it repairs the copies.

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
        self._saved_step: int | None = None
        self.about = {
            "config": architecture(config) | positions(config),
            "stage": stage,
            "tokenizer": tokenizer_hash(tokenizer),
            **_learned_from(args),
            **facts,
        }
        self.settings = {name: value for name, value in vars(args).items() if name not in MAY_CHANGE} | {
            "dtype": runtime.dtype_name,
            "deepspeed": bool(args.deepspeed),
            "zero_stage": (runtime.deepspeed_config or {}).get("zero_optimization", {}).get("stage", 0),
            "world_size": runtime.world_size,
            "held out of data_path": bool(args.eval_interval) and not args.eval_path,
            "tokenizer": self.about["tokenizer"],
            **architecture(config),
            "rope_scaling": config.rope_scaling,
            **facts,
        }
        if args.max_seq_len > config.max_seq_len:
            raise UserError(f"--max_seq_len {args.max_seq_len}: the model takes at most {config.max_seq_len} tokens")
        if not runtime.is_main:  # what lies on another machine decides nothing: rank 0 does
            return
        if args.resume and self.path.exists() and not self.pointer.is_file():
            raise UserError(
                f"{self.path} exists, but {self.folder} has no checkpoint to resume from: use --overwrite to replace it"
            )
        if not (args.resume or args.overwrite) and (self.path.exists() or self.pointer.is_file()):
            raise UserError(f"{self.path} already exists: use --resume to continue that run, --overwrite to replace it")
        self._lock = lock_run(self.folder, self.path)

    def save(self, model: nn.Module, optimizer, scaler, progress: Progress, metrics: dict) -> None:
        """Write everything; all ranks must call it.

        Raises:
            UserError: it could not be written; the previous checkpoint is intact.
        """
        run = self.runtime
        weights = full_state_dict(model, run, self.keep)
        random = run.gather(random_state(run.device))
        with self._new_folder(f"step_{progress.step:08d}") as folder:
            if run.deepspeed_config:
                with writing_tensors():
                    model.save_checkpoint(str(folder), tag="engine")
                _wait(run)  # every rank has written its part
            if not run.is_main:
                return
            written = sorted(path for path in folder.rglob("*") if path.is_file())
            for path in written:
                flush_to_disk(path)
            hashes = {path.relative_to(folder).as_posix(): file_hash(path) for path in written}
            for rank, state in enumerate(random):
                hashes[f"rank_{rank}.pt"] = save_tensors(state, folder / f"rank_{rank}.pt")
            hashes["model.pth"] = save_tensors(weights, folder / "model.pth")
            about = self.about | dataclasses.asdict(progress) | {"sha256": hashes["model.pth"]}
            save_json(about | {"metrics": metrics}, folder / "model.json")
            state = {"scaler": scaler.state_dict()}
            if not run.deepspeed_config:
                state["optimizer"] = optimizer.state_dict()
            hashes["optimizer.pt"] = save_tensors(state, folder / "optimizer.pt")
            facts = {"progress": dataclasses.asdict(progress), "settings": self.settings, "about": about}
            seal(folder, facts, hashes)  # without the metrics, which are yet to be added to
        self._saved_step = progress.step

    def add_metrics(self, progress: Progress, metrics: dict) -> None:
        """Tell in the json what was measured of the weights after they were saved; nothing when this step saved none.

        Raises:
            UserError: it could not be written; the json is unchanged.
        """
        if not self.runtime.is_main or self._saved_step != progress.step:
            return
        path = self.folder / self.pointer.read_text(encoding="utf-8").strip() / "model.json"
        about = json.loads(path.read_text(encoding="utf-8"))
        for place in (path, self.path.with_suffix(".json")):
            save_json(about | {"metrics": metrics}, place)

    @contextlib.contextmanager
    def _new_folder(self, name: str) -> Iterator[Path]:
        """A folder to write into; when rank 0 has written all of it, it becomes the one to go on from."""
        run, temporary, final = self.runtime, self.folder / ".saving", self.folder / name
        try:
            if run.is_main:
                if temporary.exists():
                    shutil.rmtree(temporary)
                temporary.mkdir(parents=True)
            _wait(run)
            yield temporary
            if not run.is_main:
                return
            while final.exists():  # the run that this one replaces stopped at the same step
                final = final.with_name(final.name + "_")
            move(temporary, final)
            with replacing(self.pointer) as pointer:
                pointer.write_text(final.name, encoding="utf-8")
            self._publish(final)
            self._tidy(final)
        except OSError as error:
            raise write_error(final, error) from error
        finally:
            if run.is_main and temporary.exists():
                shutil.rmtree(temporary)

    def _tidy(self, current: Path) -> None:
        """Delete older states, and what a killed run was writing."""
        for left in self.folder.iterdir():
            if left.is_dir() and left != current:
                shutil.rmtree(left)
        beside = (".pth", ".json", ".metrics.jsonl", ".png")
        for path in (self.pointer, *(self.path.with_suffix(suffix) for suffix in beside)):
            for left in left_by_a_kill(path):
                left.unlink()

    def _publish(self, folder: Path) -> None:
        """Copy weights and json to their usual place."""
        for name, path in (("model.pth", self.path), ("model.json", self.path.with_suffix(".json"))):
            with replacing(path) as temporary:
                shutil.copyfile(folder / name, temporary)

    def load(self, model: nn.Module, optimizer, scaler, dataset: RowDataset | None = None) -> Progress:
        """Continue: fill model, optimizer, scaler and random state with what was saved last; nothing saved = a start.

        All ranks must call it: rank 0 decides. From here on Ctrl-C and its like save first.

        Args:
            dataset: the training data; it must be unchanged.

        Raises:
            UserError: the saved run had other settings or data, so that it cannot be continued exactly; or it is
                damaged; or a rank has other settings, data, files or weights than rank 0.
        """
        run, progress = self.runtime, Progress()
        if dataset is not None:
            self.settings["data"] = dataset.identity
        self._compare_ranks()
        saved = run.gather(self._saved_last())[0]
        if saved is not None:
            folder = self.folder / saved
            try:
                state = unseal(folder, run)
                then = state["settings"].pop("data", {})  # none by earlier versions
                if dataset is not None and (change := dataset.changed_since(then)):
                    raise UserError(f"--resume: {change}; or start over with --overwrite")
                self._compare(state["settings"])
                self._restore(folder, model, optimizer, scaler)
                progress = Progress(**state["progress"])
                if run.is_main:
                    self._mend(folder, state.get("about"))
            except (OSError, LookupError, TypeError, ValueError, RuntimeError) as error:
                reason = " ".join(str(error).split())[:200]
                raise UserError(
                    f"{folder} cannot be continued ({type(error).__name__}: {reason}): start over with --overwrite"
                ) from error
            require_same_weights(model, run)
            run.print(f"resumed at step {progress.step} from {folder}")
        run.catch_signals()
        return progress

    def _saved_last(self) -> str | None:
        """The name of the folder to resume from; None to start."""
        if self.resuming and self.runtime.is_main and self.pointer.is_file():
            return last_saved(self.pointer)
        return None

    def _compare_ranks(self) -> None:
        """Refuse ranks that would not train one and the same run: other data, another tokenizer or teacher, say."""
        settings = self.runtime.gather({name: value for name, value in self.settings.items() if name != "data_path"})
        for rank, theirs in enumerate(settings):
            for name, value in theirs.items():
                if value != settings[0].get(name):
                    raise UserError(f"rank {rank} has {name} {value}, and rank 0 has {settings[0].get(name)}")

        if self.settings["zero_stage"] and self.runtime.first_that_differs(read_owner(self.folder)):
            raise UserError(
                f"{self.folder} is not shared by all machines, but DeepSpeed's ZeRO saves a shard of each rank "
                "there: give all machines a shared --out_dir"
            )

    def _mend(self, folder: Path, about: dict | None) -> None:
        """Put right what a crash between the parts of a save left, or what has been damaged since.

        Args:
            about: what the folder's model.json holds beside metrics; None: saved by an earlier version.

        Raises:
            UserError: that is damaged.
        """
        beside, saved = self.path.with_suffix(".json"), folder / "model.json"
        there = self.path.is_file() and beside.is_file()
        found = read_object(saved)
        if about is not None and about != {name: value for name, value in found.items() if name != "metrics"}:
            raise damaged(saved, "other facts")
        weights = found.get("sha256")  # None: saved by an earlier version
        if not there or beside.read_bytes() != saved.read_bytes() or weights not in (None, file_hash(self.path)):
            self._publish(folder)
        self._tidy(folder)

    def _compare(self, saved: dict) -> None:
        """Refuse to go on with settings that give other numbers; say those that the user may want to change."""
        for name, ours in self.settings.items():
            theirs = saved.get(name, ours)
            if theirs == ours:
                continue
            if name not in MAY_CHANGE_WITH_NOTICE:
                raise UserError(
                    f"--resume: the saved run had {name} {theirs}, this one has {ours}; "
                    "use the same value, or start over with --overwrite"
                )
            self.runtime.print(f"--resume: {name} was {theirs} and is now {ours}")

    def _restore(self, folder: Path, model: nn.Module, optimizer, scaler) -> None:
        state = load_tensors(folder / "optimizer.pt")
        if state["scaler"]:  # float16 had one; a run that goes on in it from another dtype begins with its own
            scaler.load_state_dict(state["scaler"])
        if self.runtime.deepspeed_config:
            if model.load_checkpoint(str(folder), tag="engine")[0] is None:
                raise ValueError("DeepSpeed found none of its files there")
        else:
            plain = plain_model(model)
            given = {key: value for key, value in plain.state_dict().items() if not self.keep(key)}
            plain.load_state_dict(given | load_tensors(folder / "model.pth"))
            optimizer.load_state_dict(state["optimizer"])
        set_random_state(self.runtime.device, load_tensors(folder / f"rank_{self.runtime.rank}.pt"))


def _learned_from(args) -> dict:
    """For the json: the data file, or the files of a mixture with their shares; and the weights it began with."""
    mix, start = getattr(args, "mix", None), getattr(args, "from_weight", None)
    learned = {"data_path": str(args.data_path)} if not mix else {"data_path": None, "mix": mix}
    return learned | ({} if start in (None, "none") else {"from_weight": start})


def _wait(runtime: Runtime) -> None:
    if runtime.world_size > 1:
        dist.barrier(device_ids=device_ids(runtime.device))
