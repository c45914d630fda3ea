"""Locks on files, on any system: a lock ends with the process that holds it, so a crash leaves none behind."""

import errno
import os
from pathlib import Path
from typing import BinaryIO

from filelock import lock_descriptor

# How file systems say that they have none: NFS without its lock daemon, Lustre without -o flock, some of FUSE
NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP}


class NoLocksError(OSError):
    """The file system has no locks."""


def lock(path: Path, wait: bool = True) -> BinaryIO | None:
    """The open file at `path`, created if necessary, locked until it is closed or this process ends.

    Returns:
        None if another process holds the lock and we do not `wait` for it.

    Raises:
        NoLocksError: the file system, or the operating system, has no locks.
        OSError: the file cannot be opened for writing.
    """
    file = open(path, "ab")  # noqa: SIM115 - open as long as the lock is held
    try:
        if lock_descriptor(file.fileno(), blocking=wait):
            return file
    except OSError as error:
        file.close()
        if error.errno in NO_LOCKS:
            raise NoLocksError(error.errno, error.strerror, str(path)) from error
        raise
    except NotImplementedError as error:  # filelock's word for a system that has none
        file.close()
        raise NoLocksError(errno.ENOSYS, os.strerror(errno.ENOSYS), str(path)) from error
    except BaseException:  # Ctrl-C while waiting
        file.close()
        raise
    file.close()
    return None
