"""The files that a run goes on from, each known by its hash: from a damaged one no run goes on."""

import hashlib
import json
from pathlib import Path

from trainer.errors import UserError
from trainer.files import file_hash, save_json
from trainer.runtime import Runtime

STATE = "state.json"


def seal(folder: Path, state: dict, hashes: dict[str, str]) -> None:
    """Write `state.json`, the last file of a folder.

    Args:
        state: JSON values, without a key "sha256".
        hashes: the SHA-256 of every other file that is read to go on, by its path in the folder.
    """
    save_json(state | {"sha256": hashes | {STATE: _hash_state(state, hashes)}}, folder / STATE)


def unseal(folder: Path, run: Runtime) -> dict:
    """What `seal` was given as `state`, when all files are there and as they were written. All ranks must call it.

    A folder of an earlier version, which kept no hashes, is taken as it is.

    Raises:
        UserError: a file is missing on this rank, is damaged, or another than rank 0 has; the message names it.
        LookupError: `state.json` is none of ours.
    """
    _require(folder / STATE, run)
    state = read_object(folder / STATE)
    if rank := run.first_that_differs(file_hash(folder / STATE)):
        raise UserError(f"rank {rank} has a different {folder / STATE} from rank 0: copy rank 0's file there")
    if "sha256" not in state:
        return state
    hashes = state.pop("sha256")
    if hashes.pop(STATE) != _hash_state(state, hashes):
        raise damaged(folder / STATE)
    for name, expected in hashes.items():
        _require(folder / name, run)
        if file_hash(folder / name) != expected:
            raise damaged(folder / name)
    return state


def _hash_state(state: dict, hashes: dict[str, str]) -> str:
    return hashlib.sha256(json.dumps([state, hashes]).encode()).hexdigest()


def _require(path: Path, run: Runtime) -> None:
    if path.is_file():
        return
    if run.is_main:
        raise UserError(f"{path} is missing, and the run cannot be resumed without it: start over with --overwrite")
    raise UserError(
        f"rank {run.rank} has no {path}, from which rank 0 resumes: give all machines a shared --out_dir, "
        "or copy rank 0's file there"
    )


def read_object(path: Path) -> dict:
    """The JSON object in a file.

    Raises:
        UserError: there is none.
    """
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        raise damaged(path, "not a JSON object") from None


def damaged(path: Path, how: str = "another sha256") -> UserError:
    """The error to raise when a file is not what was saved."""
    return UserError(f"{path} is damaged: it does not match what was saved ({how}): start over with --overwrite")


def last_saved(pointer: Path) -> str:
    """The name of the folder beside a pointer to go on from.

    Raises:
        UserError: the pointer names none that is there.
    """
    name = pointer.read_text(encoding="utf-8", errors="replace").strip()
    there = sorted(path.name for path in pointer.parent.iterdir() if (path / STATE).is_file())
    if there and name not in there:
        raise UserError(f"{pointer} is damaged, it names {name!r}: write the existing {there[-1]} into it")
    return name
