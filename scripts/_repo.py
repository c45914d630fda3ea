"""Lets `python scripts/x.py` find the packages of the repository, from any working directory.

Python puts the script's own folder on its path, not the repository's root; importing this module before any package adds
the root. It is the one place of the project that touches the path. Then it looks whether all is here that scripts need.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import trainer.start  # noqa: F401  (says what to do where PyTorch is missing)
