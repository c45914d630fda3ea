"""Which package may import which: model, then dataset, trainer, scripts with the stage scripts, benchmarks; no circles.

Imports inside functions count, too: they may delay a heavy package, but not avoid a circle.
"""

import ast
import subprocess
from functools import cache
from pathlib import Path

import pytest

from tests.running import ROOT

LAYERS = {"model": 0, "dataset": 1, "trainer": 2, "scripts": 3, "benchmarks": 4}
STAGE = 3  # train_*.py and eval_*.py: they use the packages below, and the commands' helpers


@cache
def modules() -> dict[str, Path]:
    """Every module of the project, by its dotted name."""
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard", "*.py"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split()
    paths = [Path(line) for line in listed if not line.startswith("tests/") and (ROOT / line).exists()]
    return {".".join(path.with_suffix("").parts).removesuffix(".__init__"): ROOT / path for path in paths}


@cache
def imports(module: str) -> tuple[str, ...]:
    """The project's modules that a module imports, anywhere in it."""
    tree = ast.parse(modules()[module].read_text(encoding="utf-8"))
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            named = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            named = [node.module] + [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        found += [name for name in named if name in modules()]
    return tuple(found)


def layer(module: str) -> int:
    return LAYERS.get(module.split(".")[0], STAGE)


@pytest.mark.parametrize("module", sorted(modules()))
def test_no_import_runs_upwards(module):
    upwards = [name for name in imports(module) if layer(name) > layer(module)]
    assert upwards == []


def test_no_import_runs_in_a_circle():
    done, path = set(), []

    def visit(module: str) -> None:
        assert module not in path, " -> ".join([*path[path.index(module) :], module])
        if module in done:
            return
        path.append(module)
        for name in imports(module):
            if name != module and not module.startswith(f"{name}."):
                visit(name)
        path.pop()
        done.add(module)

    for module in modules():
        visit(module)


def test_no_two_files_have_one_name():
    names = [path.name for path in modules().values() if path.name != "__init__.py"]
    assert sorted(names) == sorted(set(names))


def test_files_of_logic_stay_short():
    long = {
        str(path.relative_to(ROOT)): n
        for path in modules().values()
        if (n := len(path.read_text(encoding="utf-8").splitlines())) > 420
    }
    assert long == {}
