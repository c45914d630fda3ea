"""Lets `python scripts/x.py` find the packages of the repository, from any working directory.

Python puts the script's own folder on its path, not the repository's root. Importing this module before any package of
ours adds the root: the one place of the project that touches the path. Then it checks that all packages are installed.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import trainer.start  # noqa: F401  (says what to do where PyTorch is missing)
