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
        ValueError, OSError: `state.json` is no such file.
    """
    _require(folder / STATE, run)
    state = json.loads((folder / STATE).read_text(encoding="utf-8"))
    if rank := run.first_that_differs(file_hash(folder / STATE)):
        raise UserError(f"rank {rank} has another {folder / STATE} than rank 0, which goes on from its own: copy that")
    if "sha256" not in state:
        return state
    hashes = state.pop("sha256")
    if hashes.pop(STATE) != _hash_state(state, hashes):
        raise _damaged(folder / STATE)
    for name, expected in hashes.items():
        _require(folder / name, run)
        if file_hash(folder / name) != expected:
            raise _damaged(folder / name)
    return state


def _hash_state(state: dict, hashes: dict[str, str]) -> str:
    return hashlib.sha256(json.dumps([state, hashes]).encode()).hexdigest()


def _require(path: Path, run: Runtime) -> None:
    if path.is_file():
        return
    if run.is_main:
        raise UserError(f"{path} is missing, and without it the run cannot be continued: --overwrite starts anew")
    raise UserError(
        f"rank {run.rank} has no {path}, which rank 0 goes on from: give all machines one --out_dir that they share, "
        "or copy rank 0's there"
    )


def _damaged(path: Path) -> UserError:
    return UserError(f"{path} is damaged, it is not what was saved (another sha256): --overwrite starts anew")
