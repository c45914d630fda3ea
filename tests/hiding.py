"""Simulates Python on Windows as far as possible: Unix-only modules and attributes are hidden from the project's code.

`python -m tests.hiding modules` imports every module of the repository, and prints a line for each that fails.
`python -m tests.hiding run SCRIPT ARGUMENTS…` runs a script whose processes are spawned, not forked.

Installed packages still see the real system. Files also behave as on Windows: none can be flushed through a read-only
handle, and none can be renamed or replaced while it is open or mapped.
"""

import builtins
import contextlib
import errno
import functools
import importlib
import multiprocessing
import os
import runpy
import signal
import sys
import time
import traceback
import types
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ROOMS = ("model", "dataset", "trainer", "scripts", "benchmarks")
MODULES = frozenset("crypt fcntl grp nis ossaudiodev posix pty pwd readline resource spwd syslog termios tty".split())
ATTRIBUTES = {
    os: (
        *("chown", "fchown", "fork", "forkpty", "getegid", "geteuid", "getgid", "getgroups", "getloadavg", "getpgid"),
        *("getuid", "killpg", "lchown", "mkfifo", "mknod", "nice", "openpty", "O_CLOEXEC", "O_DIRECTORY", "O_NOFOLLOW"),
        *("O_NONBLOCK", "posix_fallocate", "posix_spawn", "pread", "pwrite", "sched_getaffinity", "sched_yield"),
        *("setgid", "setsid", "setuid", "statvfs", "sync", "sysconf", "ttyname", "uname", "WNOHANG", "waitid"),
    ),
    signal: (
        *("SIGALRM", "SIGCHLD", "SIGCONT", "SIGHUP", "SIGKILL", "SIGPIPE", "SIGQUIT", "SIGSTOP", "SIGTSTP", "SIGUSR1"),
        *("SIGUSR2", "SIGWINCH", "SIGXFSZ", "alarm", "pause", "pthread_kill", "pthread_sigmask", "setitimer"),
        *("sigwait", "siginterrupt"),
    ),
    time: ("tzset",),
}


def ours(depth: int) -> bool:
    """Whether the calling code, `depth` frames up, is the project's own."""
    file = sys._getframe(depth + 1).f_code.co_filename
    return any(file.startswith(f"{ROOT / room}{os.sep}") for room in ROOMS) or (
        Path(file).parent == ROOT and file.endswith(".py")
    )


def hide() -> None:
    """Hide Unix-only modules, and such attributes of `os`, `signal` and `time`, from the project's code."""
    find = builtins.__import__

    def import_(name, globals=None, locals=None, fromlist=(), level=0):
        if name.partition(".")[0] in MODULES and ours(1):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return find(name, globals, locals, fromlist, level)

    builtins.__import__ = import_
    for module, names in ATTRIBUTES.items():
        module.__class__ = _lacking(names)
        module.__dict__["_hidden"] = {name: module.__dict__.pop(name) for name in names if hasattr(module, name)}


def hold_files() -> None:
    """Let `os.fsync`, `os.replace` and `os.rename` refuse what Windows refuses; /proc lists the open files.

    Where there is no /proc (macOS, and Windows, which refuses by itself) nothing is held.
    """
    if not Path("/proc/self/fd").is_dir():
        return
    fsync = os.fsync

    def flush(handle: int) -> None:
        import fcntl

        number = handle if isinstance(handle, int) else handle.fileno()
        if fcntl.fcntl(number, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
            raise OSError(errno.EBADF, "flushed through a handle that only reads")
        fsync(number)

    os.fsync = flush
    for name in ("replace", "rename"):
        setattr(os, name, functools.partial(_move, getattr(os, name)))


def _move(move, source, target, **how) -> None:
    open_now = open_files()
    for path in map(os.path.realpath, (source, target)):
        if any(held == path or held.startswith(f"{path}{os.sep}") for held in open_now):
            raise PermissionError(errno.EACCES, "moved while it is open", str(path))
    move(source, target, **how)


def open_files() -> set[str]:
    """The files that this process has open or mapped, except the code that it runs."""
    found = set()
    for link in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):
            found.add(os.readlink(link))
    maps = Path("/proc/self/maps").read_text(encoding="utf-8", errors="replace")
    return found | {line.split(maxsplit=5)[5] for line in maps.splitlines() if len(line.split(maxsplit=5)) > 5}


def _lacking(names: tuple[str, ...]) -> type[types.ModuleType]:
    """A module type whose attributes of these names only installed packages can see."""

    class Lacking(types.ModuleType):
        def __getattr__(self, name):
            if name in names and name in self._hidden and not ours(1):
                return self._hidden[name]
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")

    return Lacking


def modules() -> list[str]:
    """Every module of the repository except the tests."""
    packaged = [path for room in ROOMS for path in sorted((ROOT / room).glob("**/*.py"))]
    names = [".".join(path.relative_to(ROOT).with_suffix("").parts) for path in packaged + sorted(ROOT.glob("*.py"))]
    return [name.removesuffix(".__init__") for name in names]


def main(what: str, *arguments: str) -> None:
    hide()
    if what == "modules":
        sys.path.insert(0, str(ROOT / "scripts"))  # as for any script on Windows
        for name in modules():
            try:
                importlib.import_module(name)
            except BaseException:
                print(f"{name}: {traceback.format_exc()}")
        return
    hold_files()
    multiprocessing.set_start_method("spawn")
    sys.argv = [*arguments]
    sys.path.insert(0, str(Path(arguments[0]).parent))
    runpy.run_path(arguments[0], run_name="__main__")


if __name__ == "__main__":
    main(*sys.argv[1:])
