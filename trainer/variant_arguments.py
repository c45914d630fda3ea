"""The flags of the variants of docs/architectures.md. Imports nothing heavy, so that --help answers at once."""

import argparse

from trainer.argument_types import non_negative_float, non_negative_int, positive_int
from trainer.errors import UserError

FIELDS = (  # of LMConfig, which the flags of the same name set; --n_shared_experts sets two of them
    *("hidden_dim", "n_routed_experts", "n_shared_experts", "attention", "kv_latent_dim", "rope_head_dim", "balance"),
    *("mtp_depth", "mtp", "shared_width"),
)


def add_variant_arguments(parser: argparse.ArgumentParser) -> None:
    """What a model can be that begins with nothing; one that begins with weights is what they are."""
    group = parser.add_argument_group(
        "variants of the model", "(default: as --from_weight has it, else the plain decoder)"
    )
    group.add_argument("--attention", choices=("gqa", "mla"), help="mla: DeepSeek's latent attention")
    group.add_argument("--kv_latent_dim", type=positive_int, help="of mla: width of the latent (default: 2 head sizes)")
    group.add_argument("--rope_head_dim", type=positive_int, help="of mla: rotated part (default: half a head size)")
    group.add_argument("--hidden_dim", type=positive_int, help="width of the feed-forward, or of an expert")
    group.add_argument("--n_routed_experts", type=positive_int, help="experts to choose from (default: 4)")
    group.add_argument("--n_shared_experts", type=non_negative_int, help="experts that see every token (default: 1)")
    group.add_argument(
        "--balance", choices=("loss", "bias"), help="of experts: by an auxiliary loss, or DeepSeek-V3's biases"
    )
    group.add_argument(
        "--balance_rate", type=non_negative_float, default=0.001, help="of bias: how far a step moves it"
    )
    group.add_argument("--mtp_depth", type=int, choices=(0, 1, 2), help="predict so many tokens after the next one")
    group.add_argument("--mtp", choices=("sequential", "parallel"), help="as DeepSeek-V3 does, or with parallel heads")
    group.add_argument("--mtp_weight", type=non_negative_float, default=0.3, help="of their mean loss; 0: not trained")


def check_variant_arguments(args: argparse.Namespace) -> None:
    """Refuse what does not go together, as far as the flags tell.

    Raises:
        UserError: what.
    """
    given = [name for name in FIELDS if getattr(args, name, None) is not None]
    if given and args.generation != 2:
        raise UserError(f"--{given[0]} is for --generation 2")
    experts = [name for name in ("n_routed_experts", "n_shared_experts", "balance") if name in given]
    if experts and not args.use_moe:
        raise UserError(f"--{experts[0]} is for a mixture of experts: give --use_moe")
    check_variant_engine(args, args)


def check_variant_engine(config, args: argparse.Namespace) -> None:
    """Refuse to share out a model whose variant needs it whole.

    Args:
        config: the LMConfig that is trained, or the flags.

    Raises:
        UserError: what, and why.
    """
    sharer = "--deepspeed" if args.deepspeed else "--fsdp" if args.fsdp else None
    if sharer and config.balance == "bias":
        raise UserError(f"balance bias changes buffers, of which {sharer} keeps no account: leave {sharer} out")
    if sharer and config.mtp_depth:
        raise UserError(f"mtp_depth {config.mtp_depth} does not go with {sharer}: leave one of them out")
