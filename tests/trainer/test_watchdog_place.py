"""Which line of a traceback is reported as the place where a run is stuck."""

import sys
from pathlib import Path

import pytest
import torch

from tests.running import ROOT
from trainer import watchdog


@pytest.mark.parametrize("environment", [".venv", "an environment"])
def test_an_environment_inside_the_project_is_none_of_ours(environment, monkeypatch):
    """`make test` creates the environment there, and PyTorch's files could be mistaken for the project's."""
    project = Path(sys.prefix).parent
    monkeypatch.setattr(watchdog, "ROOT", project)
    assert watchdog.is_ours(project / "trainer" / "runtime.py")
    assert not watchdog.is_ours(Path(torch.__file__))
    monkeypatch.setattr(watchdog, "LIBRARIES", {project / environment / "lib" / "python3.11" / "site-packages"})
    assert not watchdog.is_ours(project / environment / "lib" / "python3.11" / "site-packages" / "torch" / "serial.py")


def test_files_elsewhere_are_none_of_ours():
    assert watchdog.is_ours(ROOT / "tests" / "stages" / "crash_points.py")
    assert not watchdog.is_ours(Path(ROOT.anchor) / "elsewhere" / "train.py")
