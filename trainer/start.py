"""What a script needs before anything else: a Python that can run MiniMind, and a home folder for its packages.

If the packages are missing, importing this module ends the script with one line that says what to type; if the home
folder is missing, it makes one. So it is imported before any package, and even an old Python can parse it.
"""

import getpass
import importlib.util
import os
import sys
import tempfile

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
OLDEST = (3, 10)
PACKAGES = ("torch", "transformers", "tokenizers", "safetensors", "numpy", "PIL", "jsonlines", "tqdm")
CALLED = {"torch": "PyTorch", "PIL": "Pillow"}


def missing(packages):
    """The one-line message for a Python that lacks these packages."""
    names = ", ".join(CALLED.get(name, name) for name in packages)
    return f"{names} {'is' if len(packages) == 1 else 'are'} not installed for {sys.executable}: {_what_to_type()}"


def _what_to_type():
    own = os.path.join(ROOT, ".venv", *(("Scripts", "python.exe") if os.name == "nt" else ("bin", "python")))
    if os.path.exists(own) and not os.path.samefile(sys.prefix, os.path.join(ROOT, ".venv")):
        return f"type {own} instead"
    requirements = os.path.join(ROOT, "requirements.txt")
    return f"run make demo to set everything up in .venv, or {sys.executable} -m pip install -r {requirements}"


def why_not():
    """The reason why this Python cannot run MiniMind; None if it can."""
    if sys.version_info < OLDEST:
        wanted, here = (".".join(map(str, version[:2])) for version in (OLDEST, sys.version_info))
        return f"MiniMind needs Python {wanted} or newer, but {sys.executable} is {here}"
    lacking = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    return missing(lacking) if lacking else None


def settle():
    """Give this process a home folder and a user name if it has none, as in a container that runs under an arbitrary
    uid: PyTorch's compiler, Matplotlib, Streamlit and our own caches need them.

    Returns:
        the folder, or None if there is a home.
    """
    user = f"uid{os.getuid()}" if hasattr(os, "getuid") else "user"
    try:
        getpass.getuser()
    except (ImportError, KeyError, OSError):  # by Python's version, and Windows
        os.environ["USER"] = user
    if os.path.expanduser("~") != "~":
        return None
    home = os.path.join(tempfile.gettempdir(), f"minimind-{user}")
    os.makedirs(home, mode=0o700, exist_ok=True)
    if hasattr(os, "getuid") and os.stat(home).st_uid != os.getuid():  # somebody else's: compiled code will lie there
        home = tempfile.mkdtemp(prefix="minimind-")
    os.environ["USERPROFILE" if os.name == "nt" else "HOME"] = home
    return home


if _reason := why_not():
    print(f"error: {_reason}", file=sys.stderr)
    sys.exit(2)
if (_home := settle()) and os.environ.get("RANK", "0") == "0":
    print(f"no home folder: packages' caches go to {_home}", file=sys.stderr)
