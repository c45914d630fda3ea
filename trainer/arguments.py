"""The command line that all training stages share. Imports nothing heavy, so that --help is quick."""

import argparse
from pathlib import Path

from trainer.argument_types import (
    BooleanFlag,
    byte_size,
    mix_part,
    non_negative_float,
    non_negative_int,
    positive_float,
    positive_int,
    rope_scaling,
    seed,
    text,
)
from trainer.engine_settings import check_engine
from trainer.errors import UserError
from trainer.trackers import TRACKERS

ROOT = Path(__file__).resolve().parent.parent  # defaults are found from any working directory


class Parser(argparse.ArgumentParser):
    """An argument parser for `run_main`: a wrong flag ends in one line, like every error, not in a page of usage."""

    def __init__(self, description: str, **settings):
        super().__init__(description=description, formatter_class=argparse.RawDescriptionHelpFormatter, **settings)

    def error(self, message: str):
        raise UserError(f"{message} (--help lists the flags)")


def check_mix(mix: list[tuple[str, float]]) -> None:
    """Refuse a --mix that names a file twice.

    Raises:
        UserError: the message names it.
    """
    names = [str(Path(file).resolve()) for file, _ in mix]
    if twice := next((file for (file, _), name in zip(mix, names, strict=True) if names.count(name) > 1), None):
        raise UserError(f"--mix names {twice} twice: give its shares as one")


def add_untold_arguments(parser: argparse.ArgumentParser) -> None:
    """Settings that a weight file without a json does not reveal, and scaling of the positions for longer texts."""
    group = parser.add_argument_group("what the weights alone do not show")
    group.add_argument(
        "--num_experts_per_tok", type=positive_int, help="experts per token (default: 2; of generation 3: 1)"
    )
    group.add_argument("--rope_theta", type=positive_float, help="base of the rotary positions (default: 1e6)")
    group.add_argument("--inference_rope_scaling", action=BooleanFlag, help="MiniMind-3's YaRN, for 32,768 positions")
    group.add_argument(
        "--rope_scaling",
        type=rope_scaling,
        metavar="TYPE:FACTOR[:TRAINED]",
        help="scale the positions: yarn, ntk or linear",
    )


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags that name a model: shared by training and by everything that loads its weights."""
    group = parser.add_argument_group("model")
    group.add_argument(
        "--dim", type=positive_int, default=512, help="hidden size; also in the weights' names: pretrain_512.pth"
    )
    group.add_argument("--n_layers", type=positive_int, default=8, help="depth")
    group.add_argument("--use_moe", action=BooleanFlag, help="mixture of experts; adds '_moe' to the weights' names")
    group.add_argument("--tokenizer", default=None, metavar="DIR", help="tokenizer folder (default: the shipped one)")
    group.add_argument("--out_dir", default=str(ROOT / "out"), help="folder of the weights")


def add_device_argument(parser) -> None:
    """--device, added to a parser or a group."""
    what = "cpu, cuda, cuda:N, mps, xpu (default: the accelerator PyTorch finds, else cpu)"
    parser.add_argument("--device", default=None, help=what)


def add_tower_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--vision_model",
        default=str(ROOT / "model" / "vision_model" / "clip-vit-base-patch16"),
        metavar="DIR",
        help="vision tower: a transformers folder of a CLIP (default: model/vision_model/clip-vit-base-patch16)",
    )


def add_vision_arguments(parser: argparse.ArgumentParser, images_path: str | None) -> None:
    """The flags of a stage that trains on images."""
    group = parser.add_argument_group("vision")
    add_tower_argument(group)
    group.add_argument(
        "--images_path", default=images_path, metavar="DIR", help="folder of the images named in the data"
    )
    group.add_argument(
        "--cache_features", action=BooleanFlag, help="compute the tower's features once and cache them on disk"
    )


def training_parser(description: str, **defaults) -> Parser:
    """A parser with the flags every training stage has; `defaults` are the stage's own."""
    parser = Parser(description)
    add_model_arguments(parser)
    parser.add_argument(
        "--generation", type=int, choices=(2, 3), default=2, help="layout: MiniMind2's or MiniMind-3's (default: 2)"
    )
    add_untold_arguments(parser)

    data = parser.add_argument_group("data")
    data.add_argument("--data_path", help="training data, jsonl")
    data.add_argument("--eval_path", help="held-out data, jsonl (default: every 100th sample of data_path)")
    data.add_argument("--max_seq_len", type=positive_int, default=512, help="row length in tokens")
    data.add_argument(
        "--packing", action=BooleanFlag, default=True, help="pack several whole samples into a row (default: on)"
    )
    data.add_argument("--skip_bad_lines", action=BooleanFlag, help="count and report bad lines instead of stopping")
    data.add_argument("--num_workers", type=non_negative_int, default=0, help="data loading processes")
    data.add_argument(
        "--cache_limit",
        type=byte_size,
        default="50GB",
        metavar="SIZE",
        help="remove the oldest caches beyond this size; 0: no limit",
    )

    training = parser.add_argument_group("training")
    training.add_argument("--epochs", type=positive_int, default=1)
    training.add_argument(
        "--max_steps", type=non_negative_int, default=0, help="stop after this many steps (0: train all epochs)"
    )
    training.add_argument("--batch_size", type=positive_int, help="rows per device and forward pass")
    training.add_argument(
        "--accumulation_steps", type=positive_int, default=1, help="gradient accumulation: batches per optimizer step"
    )
    training.add_argument("--learning_rate", type=positive_float, help="peak learning rate")
    training.add_argument(
        "--optimizer",
        choices=("auto", "adamw", "muon", "adamw8bit"),
        default="adamw",
        help="muon: for hidden matrices; adamw8bit: 8-bit state; auto: muon, or adamw where an engine shards matrices",
    )
    training.add_argument("--warmup_iters", type=non_negative_int, default=0, help="linear warm-up steps")
    training.add_argument("--grad_clip", type=positive_float, default=1.0, help="maximum gradient norm")
    training.add_argument("--seed", type=seed, default=42)

    engine = parser.add_argument_group("machine")
    add_device_argument(engine)
    engine.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        help="autocast precision (default: bfloat16 if supported; else float16 on cuda, float32 elsewhere)",
    )
    engine.add_argument(
        "--compile", action=BooleanFlag, default=None, help="torch.compile (default: where it is faster)"
    )
    engine.add_argument("--gradient_checkpointing", action=BooleanFlag, help="use less memory, at a third more time")
    engine.add_argument(
        "--deepspeed", nargs="?", const=True, metavar="JSON", help="use DeepSpeed, optionally with a JSON config"
    )
    engine.add_argument(
        "--zero_stage", type=int, choices=(0, 1, 2, 3), default=2, help="ZeRO stage for --deepspeed without a JSON"
    )
    engine.add_argument(
        "--offload",
        choices=("optimizer", "all"),
        help="keep the optimizer's state in CPU memory, or all state, weights and gradients too, with --deepspeed "
        "(all: --zero_stage 3) or --fsdp (all only)",
    )
    engine.add_argument(
        "--local_rank", "--local-rank", type=int, help="set by launchers; ignored in favour of torchrun's RANK"
    )
    engine.add_argument("--ddp", action=BooleanFlag, help="accepted for old commands; torchrun enables DDP by itself")

    saving = parser.add_argument_group("saving and reporting")
    saving.add_argument("--save_interval", type=positive_int, default=100, help="steps between checkpoints")
    saving.add_argument(
        "--save_minutes", type=non_negative_float, default=0, metavar="N", help="also save every N minutes"
    )
    saving.add_argument("--keep_last", type=positive_int, default=2, metavar="N", help="keep the last N checkpoints")
    saving.add_argument(
        "--keep_every", type=non_negative_int, default=0, metavar="N", help="also keep every N-th step; 0: none"
    )
    saving.add_argument(
        "--save_best", action=BooleanFlag, help="copy the weights with the lowest held-out loss to NAME_best_D.pth"
    )
    saving.add_argument(
        "--stop_after",
        type=non_negative_float,
        default=0,
        metavar="MINUTES",
        help="then save and exit with code 75, for a job with a time limit; 0: never",
    )
    saving.add_argument(
        "--stall_timeout",
        type=non_negative_float,
        default=0,
        metavar="SECONDS",
        help="if no step finishes for this long, say where every rank is stuck and exit; 0: wait forever",
    )
    saving.add_argument(
        "--eval_interval", type=non_negative_int, default=100, help="steps between evaluations; 0: never"
    )
    saving.add_argument("--log_interval", type=positive_int, default=10, help="steps between log lines")
    saving.add_argument(
        "--resume", action=BooleanFlag, help="continue the last run from its checkpoint, or start a new one"
    )
    saving.add_argument("--overwrite", action=BooleanFlag, help="replace the weights of an earlier run")
    saving.add_argument("--tracker", choices=TRACKERS, help="also report to Weights & Biases, SwanLab or TensorBoard")
    saving.add_argument("--use_wandb", action=BooleanFlag, help="same as --tracker wandb")
    saving.add_argument("--wandb_project", type=text, default="MiniMind", help="tracker project name")
    parser.set_defaults(**defaults)
    return parser


def add_mix_argument(parser: argparse.ArgumentParser) -> None:
    """--mix, for a stage that can train on several files at once."""
    parser.add_argument(
        "--mix",
        type=mix_part,
        nargs="+",
        metavar="FILE:SHARE",
        help="train on several files, each with its share of the tokens, instead of --data_path",
    )


def add_fsdp_argument(parser: argparse.ArgumentParser) -> None:
    """--fsdp, for a stage that PyTorch's FSDP2 can shard."""
    parser.add_argument(
        "--fsdp", action=BooleanFlag, help="shard weights, gradients and optimizer with PyTorch's FSDP2"
    )


def add_stream_arguments(parser: argparse.ArgumentParser) -> None:
    """--stream, for a stage that can read its data while it trains."""
    parser.add_argument(
        "--stream",
        action=BooleanFlag,
        help="read data_path while training, without a cache: a file, a folder, a pattern with *, or an address such "
        "as s3://…; needs --max_steps",
    )
    parser.add_argument(
        "--stream_buffer",
        type=byte_size,
        default="8MiB",
        metavar="SIZE",
        help="text that --stream shuffles together, taken from many places of the data",
    )


def check_stream(args: argparse.Namespace) -> None:
    """Refuse flags that --stream cannot be combined with.

    Raises:
        UserError: the message names them.
    """
    if not args.max_steps:
        raise UserError("--stream needs --max_steps: a stream has no end")
    if args.epochs > 1:
        raise UserError("--stream ends after --max_steps and starts over when the data runs out: leave out --epochs")
    if args.mix:
        raise UserError("--stream reads --data_path only: leave out --mix, or --stream")


def check_training_arguments(args: argparse.Namespace) -> None:
    """Reject invalid settings before anything expensive starts.

    Raises:
        UserError: which flag, and what it takes.
    """
    if args.max_seq_len < 2:
        raise UserError("--max_seq_len must be 2 or more: a row needs an input token and a target")
    if args.resume and args.overwrite:
        raise UserError("--resume continues a run and --overwrite replaces it: choose one")
    if args.save_best and (not args.eval_interval or args.eval_interval % args.save_interval):
        raise UserError(
            "--save_best compares saved weights: --eval_interval must be a multiple of --save_interval "
            f"({args.save_interval}), not {args.eval_interval}"
        )
    if args.use_wandb and args.tracker not in (None, "wandb"):
        raise UserError(f"--use_wandb means --tracker wandb, which contradicts --tracker {args.tracker}: choose one")
    check_mix(getattr(args, "mix", None) or [])
    if getattr(args, "stream", False):
        check_stream(args)
    check_untold_arguments(args)
    check_engine(args)


def check_untold_arguments(args: argparse.Namespace) -> None:
    """Refuse two scalings of the positions.

    Raises:
        UserError: both flags were given.
    """
    if args.inference_rope_scaling and args.rope_scaling:
        raise UserError("--inference_rope_scaling and --rope_scaling both scale the positions: choose one")
