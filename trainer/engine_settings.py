"""Which engine trains: what --deepspeed, --fsdp, --zero_stage and --offload ask for, and with which optimizer."""

import argparse
import json
from pathlib import Path

from trainer.errors import UserError, print_notice

FLAGS_DECIDE = (  # settings that a DeepSpeed JSON may contain but our flags decide
    *("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping"),
    *("optimizer", "scheduler", "fp16", "bf16", "torch_autocast"),
)


def check_engine(args: argparse.Namespace) -> None:
    """Refuse engines and optimizers that do not go together, and settle --optimizer auto.

    Raises:
        UserError: which flag, and what it takes.
    """
    sharding = "DeepSpeed's ZeRO" if args.deepspeed else "--fsdp" if getattr(args, "fsdp", False) else None
    if args.optimizer == "auto":
        args.optimizer = "adamw" if sharding else "muon"
    if sharding and args.optimizer != "adamw":
        raise UserError(
            f"--optimizer {args.optimizer} needs whole matrices, which {sharding} shards: use --optimizer adamw"
        )
    if getattr(args, "fsdp", False):
        if args.deepspeed:
            raise UserError("--fsdp and --deepspeed both shard the model: choose one")
        if getattr(args, "qat", None):
            raise UserError("--qat rounds whole matrices, which --fsdp shards: leave out --fsdp")
    if args.offload:
        check_offload(args)


def check_offload(args: argparse.Namespace) -> None:
    """Refuse an --offload that the engine cannot do.

    Raises:
        UserError: what it needs.
    """
    least_stage = 3 if args.offload == "all" else 1
    if getattr(args, "fsdp", False):
        if args.offload != "all":
            raise UserError("--offload optimizer: FSDP2 offloads weights, gradients and optimizer together: use all")
    elif not args.deepspeed:
        raise UserError(f"--offload {args.offload} needs an engine that can: add --deepspeed or --fsdp")
    elif args.deepspeed is not True:
        raise UserError(f"--offload {args.offload}: {args.deepspeed} decides what is offloaded: leave out one of them")
    elif args.zero_stage < least_stage:
        raise UserError(f"--offload {args.offload} needs --zero_stage {least_stage} or more")


def deepspeed_config(args) -> dict:
    """DeepSpeed's settings, from --zero_stage or from the user's JSON.

    Raises:
        UserError: the JSON cannot be read.
    """
    config = {"zero_optimization": {"stage": args.zero_stage}}
    offloaded = {None: (), "optimizer": ("optimizer",), "all": ("optimizer", "param")}[args.offload]
    config["zero_optimization"] |= {f"offload_{what}": {"device": "cpu"} for what in offloaded}
    if args.deepspeed is not True:
        try:
            config = json.loads(Path(args.deepspeed).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise UserError(f"--deepspeed {args.deepspeed}: {error}") from None
        if not isinstance(config, dict):
            raise UserError(f"--deepspeed {args.deepspeed}: not a JSON object")
        if dropped := [name for name in FLAGS_DECIDE if name in config]:
            print_notice(f"{args.deepspeed}: {', '.join(dropped)} ignored in favour of the flags")
    return {name: value for name, value in config.items() if name not in FLAGS_DECIDE} | {
        "train_micro_batch_size_per_gpu": args.batch_size,
        "gradient_accumulation_steps": 1,  # the loop says where a step ends: the last one of an epoch is shorter
        "gradient_clipping": args.grad_clip,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }
