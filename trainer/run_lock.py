"""The lock that keeps a second run from the folder that a run writes to."""

import os
import platform
import weakref
from pathlib import Path
from typing import BinaryIO

from dataset.locks import NoLocksError, lock
from trainer.errors import UserError, print_notice
from trainer.files import make_folder, write_error

OWNER = "lock.owner"  # beside the lock, because on Windows other processes cannot read a locked file


def lock_run(folder: Path, weights: Path) -> BinaryIO | None:
    """The open file whose lock reserves `weights` and `folder` for this run; it is released when this process ends.

    Returns:
        None on a file system that has no locks: reported in one line, and the run continues.

    Raises:
        UserError: another run holds it, or the folder is not writable.
    """
    try:
        make_folder(folder)
        file = lock(folder / "lock", wait=False)
        if file is not None:
            (folder / OWNER).write_text(f"{os.getpid()} on {platform.node()}", encoding="utf-8")
            _leave_to_this_process(file)
            return file
    except NoLocksError:
        print_notice(f"{folder} is on a file system without locks: make sure that no second run writes there")
        return None
    except OSError as error:
        raise write_error(folder, error) from error
    raise UserError(f"{weights} is being written by another run (process {read_owner(folder) or 'unknown'})")


def read_owner(folder: Path) -> str | None:
    """The process whose run writes to a folder, or wrote to it last."""
    owner = folder / OWNER
    return owner.read_text(encoding="utf-8") if owner.is_file() else None


def _leave_to_this_process(file: BinaryIO) -> None:
    """Make the DataLoader's workers close their copy of the file: they outlive a killed run by some seconds and would
    hold its lock."""
    held = weakref.ref(file)

    def close_copy() -> None:
        copy = held()
        if copy is not None:
            copy.close()

    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=close_copy)
