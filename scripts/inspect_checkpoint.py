"""List the runs in an output folder, which of their states are intact, and the command that resumes each.

    python scripts/inspect_checkpoint.py                          of out/
    python scripts/inspect_checkpoint.py /mnt/out
    python scripts/inspect_checkpoint.py out/pretrain_512.pth     of one run

Every file is read and compared with the checksum that was written with it. If one is damaged the exit code is 2, and
the command resumes from the newest intact state. Nothing is changed.
"""

import os
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import _repo  # noqa: F401  (lets `python scripts/inspect_checkpoint.py` find the packages)

from trainer.argument_types import BooleanFlag
from trainer.arguments import ROOT, Parser
from trainer.errors import UserError, run_main, shown


class Run(NamedTuple):
    """A run on disk: its weights and the folder to resume from, either of which may be missing."""

    weights: Path
    resume: Path


def get_args():
    parser = Parser(__doc__)
    parser.add_argument(
        "path", nargs="?", type=Path, default=ROOT / "out", metavar="OUT", help="output folder, or a run's .pth"
    )
    return parser.parse_args()


def find_runs(path: Path) -> list[Run]:
    """The runs below a folder, or the run of which `path` is the weights or the .resume folder.

    Raises:
        UserError: there is none.
    """
    if path.suffix in (".pth", ".resume") and (path.exists() or path.with_suffix(".resume").is_dir()):
        stems = {path.with_suffix("")}
    elif path.is_dir():
        found = (Path(folder) / name for folder, folders, files in _walk(path) for name in (*folders, *files))
        stems = {each.with_suffix("") for each in found if each.suffix in (".pth", ".resume")}
    else:
        raise UserError(f"{path} is neither a folder nor a run's weights")
    if not stems:
        raise UserError(f"{path} contains no run: neither NAME.pth nor NAME.resume")
    return [Run(Path(f"{stem}.pth"), Path(f"{stem}.resume")) for stem in sorted(stems)]


def _walk(path: Path) -> Iterator[tuple[str, list[str], list[str]]]:
    """os.walk, but not into the folders with a run's states."""
    for folder, folders, files in os.walk(path):
        yield folder, list(folders), files
        folders[:] = [name for name in folders if not name.endswith(".resume") and not name.startswith(".")]


def describe(run: Run) -> tuple[list[str], bool]:
    """A description of a run in lines, and whether all its files are intact."""
    from trainer.resume_files import find_whole_state, list_states, verify

    lines, whole = [f"{run.weights.with_suffix('')}"], True
    if run.weights.exists():
        found, whole = _check_weights(run.weights)
        lines.append(f"  {run.weights.name:<24}{found}")
    names = list_states(run.resume)
    for name in reversed(names):
        try:
            lines.append(f"  {name:<24}{_what_is_saved(verify(run.resume / name))}")
        except UserError as damage:
            lines.append(f"  {name:<24}{str(damage).removeprefix(f'{run.resume / name}{os.sep}')}")
            whole = False
    if owner := _writer(run.resume):
        lines.append(f"  a run is writing there: process {owner}")
    if not names:
        lines.append("  nothing to resume from" if run.weights.exists() else "  nothing is saved yet")
        return lines, whole
    try:
        name, damages = find_whole_state(run.resume / "latest")
    except UserError:
        lines.append("  no state is intact: start over with --overwrite")
        return lines, False
    if damages and whole:  # it is the pointer that is damaged
        lines.append(f"  {damages[0]}")
    lines.append(f"  resumes from {name}:")
    lines.append(f"    {command_of(verify(run.resume / name))}")
    return lines, whole and not damages


def _check_weights(path: Path) -> tuple[str, bool]:
    """A remark on published weights, and False if they are damaged."""
    from trainer.files import check_hash
    from trainer.weights import read_settings

    try:
        about = read_settings(path) or {}
        check_hash(path, path.with_suffix(".json"), about)
    except UserError as error:
        return str(error), False
    return "whole" if "sha256" in about else "not checked: there is no json, or no checksum in it", True


def _what_is_saved(state: dict) -> str:
    progress, settings = state["progress"], state["settings"]
    hours = f"{progress['seconds'] / 3600:.1f} h"
    engine = "" if settings.get("world_size", 1) == 1 else f", {settings['world_size']} processes"
    checked = "whole" if "about" in state else "saved by a version without checksums: not checked"
    return f"{checked}: {progress['tokens'] / 1e6:,.1f} M tokens, {hours}{engine}"


def _writer(folder: Path) -> str | None:
    """The process whose run holds the folder's lock; None if there is none, or locks do not work there."""
    from dataset.locks import lock
    from trainer.run_lock import read_owner

    if not (folder / "lock").is_file():
        return None
    try:
        held = lock(folder / "lock", wait=False)
    except OSError:
        return None
    if held is None:
        return read_owner(folder) or "unknown"
    held.close()
    return None


def command_of(state: dict) -> str:
    """The command line that resumes a saved state, quoted for a shell."""
    if "command" not in state:  # of an earlier version
        return "the command that started it, with --resume"
    script, *flags = state["command"]
    processes = state["settings"].get("world_size", 1)
    launcher = ["python"] if processes == 1 else ["torchrun", "--nproc_per_node", str(processes)]
    words = [*launcher, script, *_without(flags, "--overwrite", "--resume", "--local_rank"), "--resume"]
    line = shlex.join(words) if os.name == "posix" else subprocess.list2cmdline(words)
    folder = state.get("working_folder")
    return line if folder in (None, os.getcwd()) else f"cd {shlex.quote(folder)} && {line}"


def _without(flags: list[str], *names: str) -> list[str]:
    """The arguments without these flags and their values."""
    kept, i = [], 0
    while i < len(flags):
        name, _, value = flags[i].partition("=")
        name = name.replace("--no-", "--").replace("-rank", "_rank")
        i += 1
        if name not in names:
            kept.append(flags[i - 1])
        elif not value and i < len(flags) and (flags[i].lower() in BooleanFlag.WORDS or flags[i].isdigit()):
            i += 1
    return kept


def main():
    args = get_args()
    all_whole = True
    for run in find_runs(args.path):
        lines, whole = describe(run)
        print(shown("\n".join(lines)))
        all_whole &= whole
    if not all_whole:
        sys.exit(2)


if __name__ == "__main__":
    run_main(main)
