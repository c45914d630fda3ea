"""The flags of the variants of docs/architectures.md. Imports nothing heavy, so that --help answers at once."""

import argparse

from trainer.argument_types import non_negative_float, non_negative_int, positive_int
from trainer.errors import UserError

FIELDS = (  # of LMConfig, which the flags of the same name set; --n_shared_experts sets two of them
    *("hidden_dim", "n_routed_experts", "n_shared_experts", "attention", "kv_latent_dim", "rope_head_dim", "balance"),
    *("mtp_depth", "mtp", "shared_width"),
)


def add_variant_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of a model that starts from scratch; one that starts from weights takes its architecture from them."""
    group = parser.add_argument_group(
        "variants of the model", "(default: taken from --from_weight, else the plain decoder)"
    )
    group.add_argument("--attention", choices=("gqa", "mla"), help="mla: DeepSeek's latent attention")
    group.add_argument("--kv_latent_dim", type=positive_int, help="mla: width of the latent (default: 2 head sizes)")
    group.add_argument("--rope_head_dim", type=positive_int, help="mla: rotated part (default: half a head size)")
    group.add_argument("--hidden_dim", type=positive_int, help="width of the feed-forward layer or expert")
    group.add_argument("--n_routed_experts", type=positive_int, help="experts to choose from (default: 4)")
    group.add_argument("--n_shared_experts", type=non_negative_int, help="experts for every token (default: 1)")
    group.add_argument(
        "--balance", choices=("loss", "bias"), help="how experts are balanced: auxiliary loss, or DeepSeek-V3's biases"
    )
    group.add_argument(
        "--balance_rate", type=non_negative_float, default=0.001, help="bias: how far each step moves it"
    )
    group.add_argument("--mtp_depth", type=int, choices=(0, 1, 2), help="how many tokens after the next one to predict")
    group.add_argument("--mtp", choices=("sequential", "parallel"), help="modules one after another, or in parallel")
    group.add_argument("--mtp_weight", type=non_negative_float, default=0.3, help="weight of that loss; 0: not trained")


def check_variant_arguments(args: argparse.Namespace) -> None:
    """Refuse flags that cannot be combined.

    Raises:
        UserError: the message names them.
    """
    given = [name for name in FIELDS if getattr(args, name, None) is not None]
    if given and args.generation != 2:
        raise UserError(f"--{given[0]} needs --generation 2")
    experts = [name for name in ("n_routed_experts", "n_shared_experts", "balance") if name in given]
    if experts and not args.use_moe:
        raise UserError(f"--{experts[0]} needs a mixture of experts: add --use_moe")
    check_variant_engine(args, args)


def check_variant_engine(config, args: argparse.Namespace) -> None:
    """Refuse to shard a model whose variant does not support it.

    Args:
        config: the LMConfig that is trained, or the flags.

    Raises:
        UserError: the message says which, and why.
    """
    sharer = "--deepspeed" if args.deepspeed else "--fsdp" if args.fsdp else None
    if sharer and config.balance == "bias":
        raise UserError(f"balance bias updates buffers, which {sharer} does not track: leave {sharer} out")
    if sharer and config.mtp_depth:
        raise UserError(f"mtp_depth {config.mtp_depth} cannot be combined with {sharer}: leave one of them out")
