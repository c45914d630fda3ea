"""What the model package promises: it imports no other package of the project."""

import ast

from tests.running import ROOT

OTHER_ROOMS = {"dataset", "trainer", "scripts", "benchmarks", "tests", "argparse"}


def imports_of(path) -> set[str]:
    """The top-level packages that a file imports, anywhere in it."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module.split(".")[0])
    return names


def test_it_knows_no_other_room_and_no_arguments():
    files = list((ROOT / "model").glob("*.py"))
    assert len(files) > 5
    for path in files:
        assert not imports_of(path) & OTHER_ROOMS, path
    assert "torch" in imports_of(ROOT / "model" / "model.py")
