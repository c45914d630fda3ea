"""The requirements files and pyproject.toml name the same packages, and include all that the code imports."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.running import ROOT

if sys.version_info >= (3, 11):
    import tomllib
else:  # installed with pytest
    import tomli as tomllib

OURS = {"model", "dataset", "trainer", "scripts", "benchmarks", "tests", "_repo", "_own_python", "tomli"} | {
    path.stem for path in ROOT.glob("*.py")
}
PACKAGE_OF = {"PIL": "pillow", "charset_normalizer": "charset-normalizer"}  # where a module's name differs


def group(name: str) -> list[str]:
    """The requirements of a dependency group in pyproject.toml, including those of the groups that it includes."""
    groups = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["dependency-groups"]
    found = []
    for entry in groups[name]:
        found += group(entry["include-group"]) if isinstance(entry, dict) else [entry]
    return found


def requirements(name: str) -> list[str]:
    """The requirements in a file, including those of the files that it includes."""
    found = []
    for line in (ROOT / name).read_text(encoding="utf-8").splitlines():
        if line.startswith("-r "):
            found += requirements(line.removeprefix("-r "))
        elif line and not line.startswith("#"):
            found.append(line)
    return found


@pytest.mark.parametrize(
    ("file", "name"),
    [
        ("requirements-core.txt", "core"),
        ("requirements.txt", "all"),
        ("requirements-dev.txt", "dev"),
        ("requirements-eval.txt", "eval"),
    ],
)
def test_the_file_lists_what_pyproject_lists(file, name):
    assert sorted(requirements(file)) == sorted(group(name))


def imported(folder: str) -> set[str]:
    """The third-party top-level modules that the tracked files under a folder import."""
    listed = subprocess.run(["git", "ls-files", folder], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    modules = set()
    for path in (Path(ROOT / line) for line in listed.splitlines() if line.endswith(".py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                modules |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                modules.add(node.module.split(".")[0])
    return {PACKAGE_OF.get(name, name) for name in modules - OURS - sys.stdlib_module_names}


def names(lines: list[str]) -> set[str]:
    return {re.split(r"[<>=!~ \[]", line)[0] for line in lines}


def test_what_users_run_imports_only_what_is_listed():
    used = set().union(*map(imported, ("model", "dataset", "trainer", "scripts", ":(glob)*.py")))
    examined_with = names(requirements("requirements-eval.txt"))
    assert used - examined_with <= names(requirements("requirements.txt"))
    assert examined_with <= imported("scripts/evaluation")


def test_what_is_listed_is_imported():
    used = set().union(*map(imported, ("model", "dataset", "trainer", "scripts", ":(glob)*.py")))
    assert names(requirements("requirements.txt")) <= used | {"tensorboard"}  # torch.utils.tensorboard needs it


def test_the_packages_need_no_more_than_the_core():
    used = set().union(*map(imported, ("model", "dataset", "trainer")))
    assert used - {"deepspeed", "wandb", "swanlab"} <= names(requirements("requirements-core.txt"))
