"""trainer/start.py: a Python without the packages, and a user without a home folder."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.running import ROOT
from trainer import start

BARE = (sys.executable, "-S", "-E")  # the standard library only
NOBODY = 12345
SCRIPTS = [
    path.relative_to(ROOT)
    for path in (*sorted(ROOT.glob("*.py")), *sorted((ROOT / "scripts").glob("*.py")))
    if "run_main(main)" in (text := path.read_text(encoding="utf-8"))
    and "import _own_python" not in text  # these install what they need: tests/scripts/test_own_python.py
]
assert SCRIPTS  # otherwise a renamed entry point would silently leave nothing to test


def one_line(done: subprocess.CompletedProcess) -> str:
    assert (done.returncode, done.stdout) == (2, ""), done.stderr
    (line,) = done.stderr.splitlines()
    return line


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_python_without_packages_ends_in_one_line(script):
    line = one_line(subprocess.run([*BARE, ROOT / script], capture_output=True, text=True, check=False))
    assert line.startswith("error: PyTorch, transformers, ")
    assert f"are not installed for {sys.executable}: " in line


@pytest.mark.parametrize("benchmark", sorted(path.stem for path in (ROOT / "benchmarks").glob("*.py")))
def test_a_benchmark_without_packages_too(benchmark):
    command = [*BARE, "-m", f"benchmarks.{benchmark}"]
    line = one_line(subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False))
    assert line.startswith("error: PyTorch, transformers, ")


def test_what_to_type(monkeypatch, tmp_path):
    monkeypatch.setattr(start, "ROOT", str(tmp_path))
    monkeypatch.setattr(sys, "executable", "/usr/bin/python3")
    told = start.missing(["torch"])
    assert told.startswith(
        "PyTorch is not installed for /usr/bin/python3: run make demo to set everything up in .venv, or "
    )
    assert told.endswith(f"/usr/bin/python3 -m pip install -r {tmp_path / 'requirements.txt'}")
    own = tmp_path / ".venv" / "bin" / "python"
    own.parent.mkdir(parents=True)
    own.touch()
    assert start.missing(["PIL", "gguf"]) == f"Pillow, gguf are not installed for /usr/bin/python3: type {own} instead"
    monkeypatch.setattr(sys, "prefix", str(tmp_path / ".venv"))
    assert "pip install" in start.missing(["torch"])  # this Python is already .venv's


def test_what_is_not_installed_is_named(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in ("torch", "PIL") else object())
    assert start.why_not().startswith("PyTorch, Pillow are not installed for ")


def test_an_old_python_is_named(monkeypatch):
    assert start.why_not() is None
    monkeypatch.setattr(start.sys, "version_info", (3, 9, 18))
    assert start.why_not() == f"MiniMind needs Python 3.10 or newer, but {sys.executable} is 3.9"
    monkeypatch.setattr(start.sys, "version_info", (3, 10, 0))
    assert start.why_not() is None


@pytest.fixture
def nobody(monkeypatch, tmp_path) -> Path:
    """Simulate a process without a home folder and user name; returns the folder for temporary files."""
    for name in ("HOME", "LOGNAME", "USER", "LNAME", "USERNAME"):
        monkeypatch.setenv(name, "x")  # so that monkeypatch restores it
        monkeypatch.delenv(name)

    def unknown(*_):
        raise KeyError(f"getpwuid(): uid not found: {NOBODY}")

    monkeypatch.setattr("pwd.getpwuid", unknown)
    monkeypatch.setattr(start, "os", SimpleNamespace(**vars(os) | {"getuid": lambda: NOBODY}))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    return tmp_path


def test_a_process_without_a_home_and_a_name_gets_both(nobody, monkeypatch):
    monkeypatch.setattr(start.os, "stat", lambda path: SimpleNamespace(st_uid=NOBODY))
    home = nobody / f"minimind-uid{NOBODY}"
    assert start.settle() == str(home)
    assert (os.environ["HOME"], os.environ["USER"]) == (str(home), f"uid{NOBODY}")
    assert home.is_dir()
    assert home.lstat().st_mode & 0o077 == 0
    assert start.settle() is None  # because it has one now


def test_a_home_that_somebody_else_has_made_is_not_used(nobody):
    taken = nobody / f"minimind-uid{NOBODY}"
    taken.mkdir()  # owned by this process, which claims to be another user's
    home = Path(start.settle())
    assert home.is_dir()
    assert home != taken


def test_who_has_a_home_keeps_it(monkeypatch):
    monkeypatch.setenv("HOME", "/home/somebody")
    monkeypatch.setenv("USER", "somebody")
    assert start.settle() is None
    assert (os.environ["HOME"], os.environ["USER"]) == ("/home/somebody", "somebody")


def test_it_is_said_once_where_files_go(tmp_path):
    """In a process with an unknown uid and no home, importing the module is enough."""
    code = (
        "import os, pwd\n"
        "def unknown(*_): raise KeyError('uid not found')\n"
        "pwd.getpwuid = unknown\n"
        "import trainer.start\n"
        "from pathlib import Path; import getpass\n"
        "print(Path.home(), getpass.getuser())\n"
    )
    said = []
    for rank in ("0", "1"):
        env = {"PATH": os.environ["PATH"], "TMPDIR": str(tmp_path), "RANK": rank}
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True, check=True
        )
        home = tmp_path / f"minimind-uid{os.getuid()}"
        assert done.stdout == f"{home} uid{os.getuid()}\n"
        said.append(done.stderr)
    assert said == [f"no home folder: packages' caches go to {home}\n", ""]
