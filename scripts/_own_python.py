"""Lets a demo start from any Python: where the packages are missing it makes .venv/, as `make demo` does, and goes on
there. Needs nothing but Python itself, so that it works without `make`, on Windows for example.
"""

import importlib.metadata
import os
import re
import subprocess
import sys
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
OLDEST = (3, 10)


def lacks_packages(requirements: Path) -> bool:
    """Whether this Python lacks a package of a requirements file; versions are not checked."""
    lines = requirements.read_text(encoding="utf-8").splitlines()
    for name in [re.split(r"[<>=!~ \[;]", line)[0] for line in lines if line and not line.startswith("#")]:
        try:
            importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            return True
    return False


def settle(root: Path = ROOT) -> int | None:
    """Run this script in .venv/ if this Python lacks packages that it needs.

    Returns:
        the exit code of that run; None if this Python has them, or is too old, which trainer/start.py reports.
    """
    requirements = root / "requirements-core.txt"
    own = root / ".venv" / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    if sys.version_info < OLDEST or Path(sys.prefix) == root / ".venv" or not lacks_packages(requirements):
        return None
    if not own.exists():
        print(f"making {root / '.venv'}", flush=True)
        venv.create(root / ".venv", with_pip=True)
    made = root / ".venv" / ".core"  # the Makefile's mark, too
    if not made.exists() or made.stat().st_mtime < requirements.stat().st_mtime:
        print("installing what it needs there: a few minutes, once", flush=True)
        if code := subprocess.call([str(own), "-m", "pip", "install", "--quiet", "-r", str(requirements)]):
            return code
        made.touch()
    return subprocess.call([str(own), *sys.argv])


if (_code := settle()) is not None:
    sys.exit(_code)
