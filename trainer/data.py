"""From the data flags to what a loop iterates over."""

import sys

from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

from dataset import StepLoader
from dataset.caches import limit_caches
from dataset.lm_dataset import RowDataset
from dataset.mixing import MixedRows
from dataset.stream_loader import StreamLoader
from dataset.streaming import StreamedRows
from trainer.runtime import Runtime


def open_data(
    dataset_class: type[Dataset], args, tokenizer: PreTrainedTokenizerBase, run: Runtime
) -> tuple[StepLoader | StreamLoader, Dataset | None]:
    """The training rows by steps, and the held-out rows: those of --eval_path, else some of --data_path or of each file
    of --mix; None with --eval_interval 0, or if there is too little data to hold any out.

    Raises:
        DataError: see `dataset_class`.
    """

    def rows(path: str, part: str) -> Dataset:
        return dataset_class(
            path, tokenizer, args.max_seq_len, args.packing, args.skip_bad_lines, seed=args.seed, part=part
        )

    def learned_from(part: str) -> Dataset:
        if not mix:
            return rows(args.data_path, part)
        files = [rows(path, part) for path, _ in mix]
        return MixedRows(files, None if part == "eval" else [share for _, share in mix], args.seed)

    mix = getattr(args, "mix", None)
    hold_out = bool(args.eval_interval) and not args.eval_path
    if getattr(args, "stream", False):
        return _open_stream(dataset_class, args, tokenizer, run, hold_out)
    with run.main_first():
        train = learned_from("train" if hold_out else "all")
        held_out = None
        if args.eval_interval:
            held_out = learned_from("eval") if hold_out else rows(args.eval_path, "all")
        # A stage that opens more caches limits them all afterwards, so as not to remove one that it is about to open
        if not (getattr(args, "cache_features", False) or getattr(args, "cache_reference", False)):
            limit_caches([path for path, _ in mix] if mix else [args.data_path], args.cache_limit)
    run.print(train.summary)
    if held_out is not None:
        run.print(f"held out: {held_out.summary}")
    loader = StepLoader(
        train,
        args.batch_size,
        args.accumulation_steps,
        args.epochs,
        args.seed,
        rank=run.rank,
        world_size=run.world_size,
        num_workers=args.num_workers,
    )
    return loader, held_out if held_out is not None and len(held_out) else None


def _open_stream(
    dataset_class: type[RowDataset], args, tokenizer: PreTrainedTokenizerBase, run: Runtime, hold_out: bool
) -> tuple[StreamLoader, Dataset | None]:
    """`open_data` with --stream."""
    rows = StreamedRows(
        args.data_path,
        tokenizer,
        dataset_class,
        args.max_seq_len,
        args.packing,
        args.skip_bad_lines,
        args.seed,
        args.stream_buffer,
        hold_out,
    )
    run.print(rows.summary)
    held_out = rows.held_out() if hold_out else None
    if args.eval_path and args.eval_interval:
        with run.main_first():
            held_out = dataset_class(args.eval_path, tokenizer, args.max_seq_len, args.packing, args.skip_bad_lines)
    if held_out is not None:
        run.print(f"held out: {held_out.summary}")
    loader = StreamLoader(
        rows,
        args.batch_size,
        args.accumulation_steps,
        rank=run.rank,
        world_size=run.world_size,
        num_workers=args.num_workers,
        gather=run.gather,
        stop=run.stop_because,
        report=run.print,
    )
    return loader, held_out


def count_steps(loader: StepLoader | StreamLoader, args) -> int:
    """The optimizer steps of the whole run: those of --epochs, or --max_steps if that is less."""
    return min(args.max_steps or sys.maxsize, args.epochs * loader.steps_per_epoch)
