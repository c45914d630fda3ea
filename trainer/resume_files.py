"""The states that a run can resume from: folders with a hash of each file, the newest one first."""

import hashlib
import json
from pathlib import Path

from trainer.errors import UserError
from trainer.files import file_hash, save_json
from trainer.runtime import Runtime

STATE = "state.json"


class Damaged(UserError):
    """A file differs from what was saved."""

    def __init__(self, path: Path, how: str = "another sha256"):
        super().__init__(f"{path} is damaged: it does not match what was saved ({how})")


def step_of(name: str) -> int:
    """The optimizer step after which a state was saved, by its folder's name."""
    return int(name.removeprefix("step_").rstrip("_"))


def list_states(folder: Path) -> list[str]:
    """The names of the states in a run's folder, damaged or not, the oldest first."""
    if not folder.is_dir():
        return []
    names = [path.name for path in folder.glob("step_*") if path.is_dir()]
    return sorted((name for name in names if name[5:].rstrip("_").isdigit()), key=lambda name: (step_of(name), name))


def find_whole_state(pointer: Path) -> tuple[str, list[str]]:
    """The state to resume from: the one that a pointer names, or the newest intact one before it.

    Returns:
        its name, and the damage of each state that was skipped.

    Raises:
        UserError: there is none.
    """
    folder, damages = pointer.parent, []
    names = list_states(folder)[::-1]
    if pointer.is_file():  # or else the first save was cut short just before it
        latest = pointer.read_text(encoding="utf-8", errors="replace").strip()
        if latest in names:
            names = [latest, *(name for name in names if step_of(name) < step_of(latest))]
        else:
            damages.append(f"{pointer} is damaged: it names {latest[:40]!r}")
    for name in names:
        try:
            verify(folder / name)
            return name, damages
        except Damaged as damage:
            damages.append(str(damage))
    raise UserError(f"{damages[-len(names)]}, and no earlier state is intact: start over with --overwrite")


def seal(folder: Path, state: dict, hashes: dict[str, str]) -> None:
    """Write `state.json`, the last file of a folder.

    Args:
        state: JSON values, without a key "sha256".
        hashes: the SHA-256 of every other file that is read to resume, by its path in the folder.
    """
    save_json(state | {"sha256": hashes | {STATE: _hash_state(state, hashes)}}, folder / STATE)


def read_state(folder: Path, run: Runtime) -> dict:
    """The `state` that was passed to `seal`. All ranks must call it; rank 0 has verified the folder.

    Raises:
        UserError: a file is missing on this rank, is damaged, or differs from rank 0's; the message names it.
    """
    if not (folder / STATE).is_file():
        raise UserError(
            f"rank {run.rank} has no {folder / STATE}, from which rank 0 resumes: give all machines a shared "
            "--out_dir, or copy rank 0's folder there"
        )
    if rank := run.first_that_differs(file_hash(folder / STATE)):
        raise UserError(f"rank {rank} has a different {folder / STATE} from rank 0: copy rank 0's file there")
    if not run.is_main:
        verify(folder)
    return _read_object(folder / STATE)


def verify(folder: Path) -> dict:
    """Check all files against their hashes, and return the `state` that was passed to `seal`; folders of earlier
    versions, which kept no hashes, are not checked.

    Raises:
        Damaged: which file is not.
    """
    state, about = _read_object(folder / STATE), _read_object(folder / "model.json")
    if "sha256" not in state:
        return state
    hashes = state.pop("sha256")
    if not isinstance(hashes, dict) or hashes.pop(STATE, None) != _hash_state(state, hashes):
        raise Damaged(folder / STATE)
    for name, expected in hashes.items():
        path = folder / name
        if not path.is_file():
            raise Damaged(path, "it is missing")
        if file_hash(path) != expected:
            raise Damaged(path)
    about.pop("metrics", None)  # added to after the other facts
    if state.get("about", about) != about:
        raise Damaged(folder / "model.json", "other facts")
    return state


def _hash_state(state: dict, hashes: dict[str, str]) -> str:
    return hashlib.sha256(json.dumps([state, hashes]).encode()).hexdigest()


def _read_object(path: Path) -> dict:
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        raise Damaged(path, "not a JSON object") from None
