"""List and free the caches of training: tokens, image features, the reference's log-probabilities.

    python scripts/cache.py list                            of dataset/ and of ~/.cache/minimind
    python scripts/cache.py list ~/data                     of what is in ~/data, and in the folders in it
    python scripts/cache.py free --all                      all but those that a run uses
    python scripts/cache.py free --older_than 30            not opened for 30 days
    python scripts/cache.py free ~/data --name sft_mini     of files and folders with this in their name

Whatever is removed is computed again when it is needed. Training itself removes the least recently used beyond
--cache_limit.
"""

import time
from pathlib import Path

import _repo  # noqa: F401  (lets `python scripts/cache.py` find the packages)

from dataset.cache_folder import home_caches, in_use
from dataset.caches import Cache, caches_in, free, human_size, places_in
from trainer.argument_types import BooleanFlag, non_negative_float
from trainer.arguments import ROOT, Parser
from trainer.errors import UserError, run_main

DAY = 24 * 60 * 60  # seconds


def get_args():
    parser = Parser(__doc__)
    parser.add_argument("action", choices=("list", "free"))
    parser.add_argument("folders", nargs="*", type=Path, metavar="DIR", help="data folder (default: see above)")
    chosen = parser.add_argument_group("which caches to list or free (all conditions must hold)")
    chosen.add_argument("--all", action=BooleanFlag, help="required by free without other conditions")
    chosen.add_argument("--older_than", type=non_negative_float, metavar="DAYS", help="not opened for this many days")
    chosen.add_argument("--name", metavar="TEXT", help="part of the name of the source file or folder")
    args = parser.parse_args()
    if args.action == "free" and not args.all and args.older_than is None and args.name is None:
        raise UserError("free what? --all, --older_than DAYS or --name TEXT")
    for folder in args.folders:
        if not folder.is_dir():
            raise UserError(f"{folder} is not a folder")
    return args


def places(folders: list[Path]) -> list[Path]:
    """The folders in which to look for caches."""
    home = home_caches()
    found = [place for folder in folders or [ROOT / "dataset"] for place in places_in(folder)]
    return found if folders or home is None else [*found, home]


def is_chosen(cache: Cache, args, now: float) -> bool:
    old = args.older_than is None or now - cache.used >= args.older_than * DAY
    return old and (args.name is None or args.name in Path(cache.source).name)


def format_line(cache: Cache, status: str, now: float) -> str:
    days = (now - cache.used) / DAY
    return f"{human_size(cache.bytes):>10}  {days:6.1f}  {status:<10}  {cache.kind:<18}  {cache.source}"


def main():
    args = get_args()
    now = time.time()
    chosen = [cache for cache in caches_in(places(args.folders)) if is_chosen(cache, args, now)]
    print(f"{'size':>10}  {'days':>6}  {'':<10}  {'kind':<18}  computed from")
    total = 0
    for cache in chosen:
        if args.action == "list":
            status = "in use" if in_use(cache.folder) else ""
        else:
            status = "freed" if free(cache) else "in use"
        total += cache.bytes * (status != "in use" or args.action == "list")
        print(format_line(cache, status, now))
    print(f"{human_size(total):>10}  {'total' if args.action == 'list' else 'freed'}")


if __name__ == "__main__":
    run_main(main)
