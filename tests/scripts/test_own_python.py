"""A demo started from a Python without packages creates .venv/ and continues there."""

import os
import subprocess
import sys
import venv

import pytest

from scripts import _own_python as own_python

OWN = "Scripts/python.exe" if os.name == "nt" else "bin/python"


@pytest.fixture
def bare(tmp_path, monkeypatch):
    """A repository that needs a missing package; the list records the commands that were run."""
    (tmp_path / "requirements-core.txt").write_text("# what it needs\nnumpy>=2\nno-such-package>=1,<2\n")
    ran: list[list[str]] = []

    def create(folder, with_pip):
        assert with_pip
        (folder / OWN).parent.mkdir(parents=True)
        (folder / OWN).touch()

    monkeypatch.setattr(venv, "create", create)
    monkeypatch.setattr(subprocess, "call", lambda command: ran.append(command) or len(ran) // 3)
    monkeypatch.setattr(sys, "argv", ["scripts/demo.py", "--help"])
    return tmp_path, ran


def test_it_makes_one_once_and_goes_on_there(bare, capsys):
    root, ran = bare
    python = str(root / ".venv" / OWN)
    assert own_python.settle(root) == 0
    installing = [python, "-m", "pip", "install", "--quiet", "-r", str(root / "requirements-core.txt")]
    assert ran == [installing, [python, "scripts/demo.py", "--help"]]
    assert "installing" in capsys.readouterr().out
    assert own_python.settle(root) == 1  # the script's exit code
    assert ran[2:] == [[python, "scripts/demo.py", "--help"]]
    assert capsys.readouterr().out == ""


def test_what_it_needs_has_changed_since(bare):
    root, ran = bare
    own_python.settle(root)
    requirements = root / "requirements-core.txt"
    os.utime(requirements, (2e9, 2e9))
    assert own_python.settle(root) == 1  # pip's
    assert len(ran) == 3


def test_it_stays_where_all_is_there(bare, monkeypatch):
    root, ran = bare
    (root / "requirements-core.txt").write_text("# none but these\nnumpy>=2\ntorch==2.13.0\n")
    assert own_python.settle(root) is None
    (root / "requirements-core.txt").write_text("no-such-package\n")
    monkeypatch.setattr(sys, "prefix", str(root / ".venv"))  # it exists already: trainer/start.py reports the error
    assert own_python.settle(root) is None
    assert ran == []
