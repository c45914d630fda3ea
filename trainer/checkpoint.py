"""Saving the complete state of a run, and resuming it."""

import dataclasses
import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

from torch import nn
from transformers import PreTrainedTokenizerBase

from dataset.lm_dataset import RowDataset
from dataset.streaming import StreamedRows
from model import LMConfig
from model.tokenizer import tokenizer_hash
from trainer.architecture import architecture, positions
from trainer.device import random_state, set_random_state
from trainer.errors import UserError, print_notice
from trainer.files import file_hash, left_by_a_kill, load_tensors, move, replacing, save_json, save_tensors, write_error
from trainer.parallel import full_state_dict, load_full_state_dict, require_same_weights
from trainer.progress import Progress
from trainer.resume_files import find_whole_state, list_states, read_state, seal, step_of
from trainer.run_lock import lock_run
from trainer.run_settings import MAY_CHANGE, compare_settings
from trainer.runtime import Runtime
from trainer.snapshot import Background, Snapshot
from trainer.weights import weights_path


class Checkpoint:
    """A stage's weights `out/NAME_D.pth`, their json, and `out/NAME_D.resume/`, which only one run at a time may write.

    A save copies everything needed to resume in memory, and continues in a thread: it writes a new folder in `resume/`,
    moves the pointer `resume/latest` to it, and copies its weights and their json to their usual place. A crash at any
    moment leaves a complete state, and a run that resumes from it repairs the copies. --keep_last and --keep_every say
    which earlier states are kept; if a state is damaged, a run resumes from the one before it.

    The saved state does not depend on how the work was distributed: a single process, DDP or any ZeRO stage resumes it.

    Args:
        keep: says which of the model's keys are saved (such as an adapter's); the others are as the stage loaded them.
        facts: further facts on the stage (LoRA's rank, DPO's beta), as JSON values: they go into the
            json, and a run that is resumed must have the same.

    Raises (on construction):
        UserError: there is an earlier run, and neither --resume nor --overwrite was given, or nothing to resume from;
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
        self.best_path = weights_path(args, f"{stage}_best") if args.save_best else None
        self.folder = self.path.with_suffix(".resume")
        self.pointer = self.folder / "latest"
        self.runtime = runtime
        self.keep = keep
        self.keep_last, self.keep_every = args.keep_last, args.keep_every
        self.resuming = args.resume
        self._begun_in = os.getcwd()
        self._states: list[str] = []  # this run's on the disk, the oldest first
        self._saved_step: int | None = None
        self._best: float | None = None
        self._snapshot, self._background = Snapshot(), Background()
        self._dataset: RowDataset | StreamedRows | None = None
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
        if not runtime.is_main:  # files on other machines are ignored: rank 0 decides
            return
        states = list_states(self.folder)
        if args.resume and self.path.exists() and not states:
            raise UserError(
                f"{self.path} exists, but {self.folder} has no checkpoint to resume from: use --overwrite to replace it"
            )
        if not (args.resume or args.overwrite) and (self.path.exists() or states):
            raise UserError(f"{self.path} already exists: use --resume to continue that run, --overwrite to replace it")
        self._lock = lock_run(self.folder, self.path)

    def save(self, model: nn.Module, optimizer, scaler, progress: Progress, metrics: dict) -> None:
        """Copy everything in memory and start writing it, see `wait`; all ranks must call it.

        Raises:
            UserError: the save before could not be written; the one before that is intact.
        """
        run = self.runtime
        content = {
            "model": full_state_dict(model, run, self.keep),
            "optimizer": {"optimizer": optimizer.state_dict(), "scaler": scaler.state_dict()},
            "random": run.gather(random_state(run.device)),
        }
        self._saved_step = progress.step
        if run.is_main:
            self.wait()  # its memory is used again
            if self._dataset is not None:  # a stream also says where it is
                self.settings["data"] = self._dataset.identity
            content, counted, metrics = self._snapshot.copy(content), dataclasses.asdict(progress), dict(metrics)
            self._background.start(lambda: self._write(content, counted, metrics))

    def wait(self) -> None:
        """Wait until the last save is on disk.

        Raises:
            UserError: it could not be written; the checkpoint before it is intact.
        """
        self._background.wait()

    def add_metrics(self, progress: Progress, metrics: dict) -> None:
        """Add metrics that were measured after the weights were saved to their json, and copy them to `NAME_best_D.pth`
        if --save_best is given and they are the best; does nothing if this step saved none.

        Raises:
            UserError: it could not be written; the json is unchanged.
        """
        if not self.runtime.is_main or self._saved_step != progress.step:
            return
        self.wait()
        folder = self.folder / self._states[-1]
        about = json.loads((folder / "model.json").read_text(encoding="utf-8")) | {"metrics": metrics}
        for place in (folder / "model.json", self.path.with_suffix(".json")):
            save_json(about, place)
        loss = metrics.get("eval_loss")
        if self.best_path and loss is not None and (self._best is None or loss < self._best):
            self._publish(folder, self.best_path)
            self._best = loss

    def _write(self, content: dict, progress: dict, metrics: dict) -> None:
        """Write a new folder; once it is wholly on disk, it becomes the state to resume from."""
        temporary, final = self.folder / ".saving", self.folder / f"step_{progress['step']:08d}"
        try:
            if temporary.exists():
                shutil.rmtree(temporary)
            temporary.mkdir(parents=True)
            hashes = {}
            for rank, state in enumerate(content["random"]):
                hashes[f"rank_{rank}.pt"] = save_tensors(state, temporary / f"rank_{rank}.pt")
            hashes["model.pth"] = save_tensors(content["model"], temporary / "model.pth")
            about = self.about | progress | {"sha256": hashes["model.pth"]}
            save_json(about | {"metrics": metrics}, temporary / "model.json")
            hashes["optimizer.pt"] = save_tensors(content["optimizer"], temporary / "optimizer.pt")
            begun = {"command": sys.argv, "working_folder": self._begun_in}
            facts = {"progress": progress, "settings": self.settings, "about": about, **begun}
            seal(temporary, facts, hashes)  # without the metrics, which are yet to be added to
            while final.exists():  # the run that this one replaces stopped at the same step
                final = final.with_name(final.name + "_")
            move(temporary, final)
            with replacing(self.pointer) as pointer:
                pointer.write_text(final.name, encoding="utf-8")
            self._states.append(final.name)
            self._publish(final, self.path)
            self._tidy()
            self._clear()
        except OSError as error:
            raise write_error(final, error) from error
        finally:
            shutil.rmtree(temporary, ignore_errors=True)  # what prevented the write may also prevent this

    def _tidy(self) -> None:
        """Delete the states that are no longer kept, and those of a run that this one replaces."""
        every = self.keep_every
        self._states = [
            *(name for name in self._states[: -self.keep_last] if every and step_of(name) % every == 0),
            *self._states[-self.keep_last :],
        ]
        for left in self.folder.iterdir():
            if left.is_dir() and left.name not in self._states:
                shutil.rmtree(left)

    def _clear(self) -> None:
        """Delete the partial files that a killed run has left."""
        beside = (".pth", ".json", ".metrics.jsonl", ".png")
        for path in (self.pointer, *(self.path.with_suffix(suffix) for suffix in beside)):
            for left in left_by_a_kill(path):
                left.unlink()

    def _publish(self, folder: Path, to: Path) -> None:
        """Copy a state's weights and json to their usual place."""
        for name, path in (("model.pth", to), ("model.json", to.with_suffix(".json"))):
            with replacing(path) as temporary:
                shutil.copyfile(folder / name, temporary)

    def load(self, model: nn.Module, optimizer, scaler, dataset: RowDataset | StreamedRows | None = None) -> Progress:
        """Resume: restore model, optimizer, scaler and random state from the last save; without one, start fresh.

        All ranks must call it: rank 0 decides. From here on Ctrl-C and similar signals save first.

        Args:
            dataset: the training data; it must be unchanged.

        Raises:
            UserError: the saved run had other settings or data, so that it cannot be continued exactly; or all that was
                saved is damaged; or a rank has other settings, data, files or weights than rank 0.
        """
        run, progress = self.runtime, Progress()
        self._dataset = dataset
        if dataset is not None:
            self.settings["data"] = dataset.identity
        self._compare_ranks()
        saved = run.gather(self._saved_last())[0]
        if saved is not None:
            folder = self.folder / saved
            try:
                state = read_state(folder, run)
                then = state["settings"].pop("data", {})  # none by earlier versions
                if dataset is not None and (change := dataset.changed_since(then)):
                    raise UserError(f"--resume: {change}; or start over with --overwrite")
                compare_settings(self.settings, state["settings"], run.print)
                if isinstance(dataset, StreamedRows):
                    dataset.position = then["position"]
                self._restore(folder, model, optimizer, scaler)
                progress = Progress(**state["progress"])
                if run.is_main:
                    self._mend(folder)
            except (OSError, LookupError, TypeError, ValueError, RuntimeError) as error:
                reason = " ".join(str(error).split())[:200]
                raise UserError(
                    f"{folder} cannot be continued ({type(error).__name__}: {reason}): start over with --overwrite"
                ) from error
            require_same_weights(model, run)
            run.print(f"resumed at step {progress.step} from {folder}")
        run.start_loop()
        return progress

    def _saved_last(self) -> str | None:
        """The name of the folder to resume from; None to start from the beginning."""
        if not (self.resuming and self.runtime.is_main and list_states(self.folder)):
            return None
        name, damages = find_whole_state(self.pointer)
        for damage in damages:
            print_notice(f"{damage}: resuming from {name}, which was saved before it")
        self._states = [*(each for each in list_states(self.folder) if step_of(each) < step_of(name)), name]
        return name

    def _compare_ranks(self) -> None:
        """Refuse ranks that would not train the same run: different data, tokenizer or teacher, for example."""
        settings = self.runtime.gather({name: value for name, value in self.settings.items() if name != "data_path"})
        for rank, theirs in enumerate(settings):
            for name, value in theirs.items():
                if value != settings[0].get(name):
                    raise UserError(f"rank {rank} has {name} {value}, but rank 0 has {settings[0].get(name)}")

    def _mend(self, folder: Path) -> None:
        """Repair files that a crash during a save left unfinished, or that have been damaged since."""
        beside, saved = self.path.with_suffix(".json"), folder / "model.json"
        there = self.path.is_file() and beside.is_file()
        weights = json.loads(saved.read_text(encoding="utf-8")).get("sha256")  # None: saved by an earlier version
        if not there or beside.read_bytes() != saved.read_bytes() or weights not in (None, file_hash(self.path)):
            self._publish(folder, self.path)
        with replacing(self.pointer) as pointer:  # it may have named a damaged one
            pointer.write_text(folder.name, encoding="utf-8")
        self._clear()
        if self.best_path and self.best_path.with_suffix(".json").is_file():
            best = json.loads(self.best_path.with_suffix(".json").read_text(encoding="utf-8"))
            self._best = best["metrics"].get("eval_loss")

    def _restore(self, folder: Path, model: nn.Module, optimizer, scaler) -> None:
        state = load_tensors(folder / "optimizer.pt")
        if "optimizer" not in state:
            raise UserError(
                f"{folder} holds DeepSpeed's own files, as MiniMind saved them before 2026-12: finish that run with "
                "the version that began it, or start over with --overwrite"
            )
        load_full_state_dict(model, optimizer, load_tensors(folder / "model.pth"), self.keep)
        optimizer.load_state_dict(state["optimizer"])
        if state["scaler"]:  # float16 had one; a run that resumes in it from another dtype starts with a fresh one
            scaler.load_state_dict(state["scaler"])
        mine = folder / f"rank_{self.runtime.rank}.pt"
        if mine.is_file():  # a run that had fewer processes saved none for the others
            set_random_state(self.runtime.device, load_tensors(mine))


def _learned_from(args) -> dict:
    """For the json: the data file, or the files of a mixture with their shares; and the weights it started from."""
    mix, start = getattr(args, "mix", None), getattr(args, "from_weight", None)
    learned = {"data_path": str(args.data_path)} if not mix else {"data_path": None, "mix": mix}
    return learned | ({} if start in (None, "none") else {"from_weight": start})
