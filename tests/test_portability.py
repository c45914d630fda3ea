"""Windows and macOS, as far as they can be tested elsewhere: nothing Unix-only is needed, text is read and written as
UTF-8, and processes are spawned."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from tests import hiding
from tests.running import PATIENCE, ROOT, TINY_TRAINING, _environment

SOURCES = [path for room in hiding.ROOMS for path in sorted((ROOT / room).glob("**/*.py"))] + sorted(ROOT.glob("*.py"))
OPENERS = ("open", "fdopen", "NamedTemporaryFile", "TemporaryFile", "TextIOWrapper")
WRITERS = ("read_text", "write_text")


def hidden(*arguments: str | Path) -> subprocess.CompletedProcess:
    """The output of tests/hiding.py."""
    command = [sys.executable, "-m", "tests.hiding", *map(str, arguments)]
    return subprocess.run(
        command,
        cwd=ROOT,
        env=_environment(None),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        encoding="utf-8",
        check=False,
        timeout=PATIENCE,
    )


def test_every_module_imports_without_what_only_unix_has():
    done = hidden("modules")
    assert (done.stdout, done.returncode) == ("", 0), done.stdout + done.stderr


@pytest.mark.parametrize("kind", [(), ("--stream",)], ids=["map-style", "stream"])
def test_a_stage_trains_without_what_only_unix_has(kind, tmp_path, tiny_data, tokenizer_dir):
    """With a worker, and with processes that are spawned, so that their arguments are pickled."""
    flags = ("--data_path", tiny_data / "pretrain_hq.jsonl", "--tokenizer", tokenizer_dir, "--out_dir", tmp_path)
    several = ("--num_workers", "1", "--max_steps", "2", "--eval_interval", "2")
    done = hidden("run", ROOT / "train_pretrain.py", *TINY_TRAINING, *flags, *several, *kind)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "step 2/2" in done.stdout
    assert (tmp_path / "pretrain_32.pth").is_file()


def test_hiding_hides_from_our_code_alone():
    """In code compiled as if it were in our files, Unix-only modules and attributes are missing, and only there."""
    code = """
from tests import hiding
hiding.hide()
def tried(source, file):
    try:
        exec(compile(source, file, "exec"), {})
        return True
    except (ImportError, AttributeError):
        return False
ours, theirs = str(hiding.ROOT / "trainer" / "x.py"), "/elsewhere/x.py"
for source in ("import fcntl", "import os; os.fork", "from os import getuid", "import signal; signal.SIGHUP"):
    assert not tried(source, ours), source
    assert tried(source, theirs), source
assert tried("import os, signal; os.getpid, signal.SIGTERM", ours)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="what is open is looked up in /proc")
def test_files_are_held_as_windows_holds_them(tmp_path):
    code = f"""
import os
from tests import hiding
hiding.hold_files()
folder = {str(tmp_path)!r}
os.mkdir(folder + "/d")
a, b, c = (folder + "/" + name for name in ("a", "b", "d/c"))
for path in (a, b, c):
    open(path, "w").close()
def refused(act, *what):
    try:
        act(*what)
    except OSError:
        return True
    return False
with open(b) as held:
    assert refused(os.fsync, held.fileno())
    assert refused(os.replace, a, b)
    assert refused(os.rename, b, a)
with open(c, "r+") as held:
    os.fsync(held.fileno())
    assert refused(os.rename, folder + "/d", folder + "/e")
os.replace(a, b)
os.rename(folder + "/d", folder + "/e")
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def calls(tree: ast.AST):
    """Each call in a module, as (name, call)."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            yield name, node


def mode_of(name: str, call: ast.Call) -> str:
    """The mode with which a call opens a file, if it is a literal."""
    given = [word.value for word in call.keywords if word.arg == "mode"]
    place = 1 if name in ("open", "fdopen") and isinstance(call.func, ast.Name | ast.Attribute) else 0
    owner = getattr(call.func, "value", None)
    if name == "open" and owner is not None and getattr(owner, "id", "") not in ("io", "os"):
        place = 0  # a method of a path
    given += call.args[place : place + 1]
    mode = given[0] if given else None
    usual = "w+b" if name.endswith("TemporaryFile") else "r"
    return mode.value if isinstance(mode, ast.Constant) and isinstance(mode.value, str) else usual


def without_encoding(source: str) -> list[int]:
    """The lines of a module that open text without naming an encoding."""
    found = []
    for name, call in calls(ast.parse(source)):
        owner = getattr(getattr(call.func, "value", None), "id", "")
        text = name in WRITERS or (
            name in OPENERS and owner not in ("Image", "os", "opener") and "b" not in mode_of(name, call)
        )
        piped = any(
            word.arg in ("text", "universal_newlines") and getattr(word.value, "value", None) for word in call.keywords
        )
        if (text or piped) and not any(word.arg == "encoding" for word in call.keywords):
            found.append(call.lineno)
    return found


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("open(path)", [1]),
        ("open(path, 'w')", [1]),
        ("open(path, mode='a')", [1]),
        ("open(path, 'rb')", []),
        ("open(path, mode='wb')", []),
        ("open(path, 'w', encoding='utf-8')", []),
        ("path.open()", [1]),
        ("path.open('rb')", []),
        ("\npath.read_text()", [2]),
        ("path.write_text(x, encoding='utf-8')", []),
        ("tempfile.NamedTemporaryFile('w')", [1]),
        ("tempfile.TemporaryFile(dir=root)", []),
        ("io.TextIOWrapper(raw)", [1]),
        ("subprocess.run(x, text=True)", [1]),
        ("subprocess.run(x, text=True, encoding='utf-8')", []),
        ("Image.open(path)", []),
        ("os.open(path, flags)", []),
    ],
)
def test_text_of_an_unknown_encoding_is_found(source, found):
    assert without_encoding(source) == found


def test_text_is_read_and_written_in_a_named_encoding():
    """Windows would use cp1252."""
    found = {path.relative_to(ROOT): without_encoding(path.read_text(encoding="utf-8")) for path in SOURCES}
    assert not {path: lines for path, lines in found.items() if lines}


def imported(source: str) -> set[str]:
    """The top-level modules that a module imports on import, not inside functions."""
    names: set[str] = set()
    waiting: list[ast.AST] = [ast.parse(source)]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names.add(node.module.partition(".")[0])
        waiting += ast.iter_child_nodes(node)
    return names


def test_no_module_imports_what_only_unix_has():
    assert imported("import fcntl\nif x:\n    from termios import tcgetattr\ndef f():\n    import pwd") == {
        "fcntl",
        "termios",
    }
    found = {path.relative_to(ROOT): imported(path.read_text(encoding="utf-8")) & hiding.MODULES for path in SOURCES}
    assert not {path: names for path, names in found.items() if names}


def needed(source: str) -> set[str]:
    """Unix-only names that a module uses from `os`, `signal` and `time` without checking that they exist."""
    tree = ast.parse(source)
    names = {module.__name__: set(hidden) for module, hidden in hiding.ATTRIBUTES.items()}
    asked = {
        (getattr(call.args[0], "id", ""), getattr(call.args[1], "value", ""))
        for name, call in calls(tree)
        if name == "hasattr" and len(call.args) == 2
    }
    taken = {
        (getattr(node.value, "id", ""), node.attr) for node in ast.walk(tree) if isinstance(node, ast.Attribute)
    } | {
        (node.module, alias.name) for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) for alias in node.names
    }
    return {f"{module}.{name}" for module, name in taken - asked if name in names.get(module, ())}


def test_no_module_needs_what_only_unix_has():
    assert needed("import os, signal\nos.fork()\nsignal.signal(signal.SIGHUP, f)\nfrom os import nice") == {
        "os.fork",
        "signal.SIGHUP",
        "os.nice",
    }
    assert not needed("if hasattr(os, 'getuid'): os.getuid()")
    assert not needed("os.getpid(), signal.SIGTERM, path.uname")
    # faults are injected with Unix features, and benchmarks/faults.py checks for them first
    sources = [path for path in SOURCES if "fault_injection" not in path.parts]
    found = {path.relative_to(ROOT): needed(path.read_text(encoding="utf-8")) for path in sources}
    assert not {path: names for path, names in found.items() if names}
