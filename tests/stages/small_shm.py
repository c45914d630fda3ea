"""Runs a script with little shared memory, as in Docker, whose /dev/shm has 64 MB.

small_shm.py 64k train_pretrain.py …    a real /dev/shm of 64 kB of its own; exit code 77 if it cannot be mounted
"""

import ctypes
import runpy
import subprocess
import sys
from pathlib import Path

CLONE_NEWNS = 0x00020000  # a mount namespace of its own


def shrink(size: str) -> bool:
    commands = (["--make-rprivate", "/"], ["-t", "tmpfs", "-o", f"size={size}", "tmpfs", "/dev/shm"])
    return ctypes.CDLL(None).unshare(CLONE_NEWNS) == 0 and all(
        subprocess.run(["mount", *command], check=False, capture_output=True).returncode == 0 for command in commands
    )


if __name__ == "__main__":
    _, size, script, *arguments = sys.argv
    if not shrink(size):
        sys.exit(77)
    script = str(Path(__file__).parents[2] / script)
    sys.argv = [script, *arguments]
    sys.path[0] = str(Path(script).parent)
    runpy.run_path(script, run_name="__main__")
