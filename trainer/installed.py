"""Whether this Python can run MiniMind: importing this module ends a script in one line that says what to type where it
cannot. So it is imported before any package, and an old Python can read it.
"""

import importlib.util
import os
import sys

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
OLDEST = (3, 10)
PACKAGES = ("torch", "transformers", "tokenizers", "safetensors", "numpy", "PIL", "jsonlines", "tqdm")
CALLED = {"torch": "PyTorch", "PIL": "Pillow"}


def missing(packages):
    """What to tell somebody whose Python lacks these packages, in one line."""
    names = ", ".join(CALLED.get(name, name) for name in packages)
    return f"{names} {'is' if len(packages) == 1 else 'are'} not installed for {sys.executable}: {_what_to_type()}"


def _what_to_type():
    own = os.path.join(ROOT, ".venv", *(("Scripts", "python.exe") if os.name == "nt" else ("bin", "python")))
    if os.path.exists(own) and not os.path.samefile(sys.prefix, os.path.join(ROOT, ".venv")):
        return f"type {own} in its place"
    requirements = os.path.join(ROOT, "requirements.txt")
    return f"make demo sets everything up in .venv, or type {sys.executable} -m pip install -r {requirements}"


def _why_not():
    """What keeps this Python from running MiniMind; None where nothing does."""
    if sys.version_info < OLDEST:
        wanted, here = (".".join(map(str, version[:2])) for version in (OLDEST, sys.version_info))
        return f"MiniMind needs Python {wanted} or newer, and {sys.executable} is {here}"
    lacking = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    return missing(lacking) if lacking else None


if _reason := _why_not():
    print(f"error: {_reason}", file=sys.stderr)
    sys.exit(2)
