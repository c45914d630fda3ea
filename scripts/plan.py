"""What a pretraining run needs, before it is started: parameters, operations, memory of each engine, time and price.

    python scripts/plan.py --dim 768 --n_layers 16                     one A100
    python scripts/plan.py --dim 2048 --n_layers 24 --gpus 8 --gpu_memory 24GB --step_tokens 1000000

Parameters, operations and the bytes of weights, gradients and optimizer are exact; activation memory is right
to within 10%; communication, time and price are estimates. The formulas are in scripts/planning/.
"""

import _repo  # noqa: F401  (lets `python scripts/plan.py` find the packages)

from trainer.argument_types import BooleanFlag, byte_size, positive_float, positive_int, probability
from trainer.arguments import Parser
from trainer.errors import UserError, run_main

GPU_NAMES = ("rtx3090", "rtx4090", "l40s", "a100", "h100", "h200", "b200")
PER_MACHINE = 8  # GPUs


def memory_size(text: str) -> int:
    """The number of bytes in a size; a bare number is in GB, as for graphics cards."""
    return byte_size(f"{text}GB" if text.strip().replace(".", "", 1).isdigit() else text)


def get_args():
    parser = Parser(__doc__)
    model = parser.add_argument_group("model")
    model.add_argument("--dim", type=positive_int, default=512, help="hidden size")
    model.add_argument("--n_layers", type=positive_int, default=8, help="depth")
    model.add_argument("--use_moe", action=BooleanFlag, help="mixture of experts")
    model.add_argument("--n_heads", type=positive_int, default=8, help="query heads")
    model.add_argument("--n_kv_heads", type=positive_int, default=2, help="key/value heads")
    model.add_argument("--vocab_size", type=positive_int, default=6400)
    run = parser.add_argument_group("run")
    run.add_argument("--max_seq_len", type=positive_int, default=512, help="row length in tokens")
    run.add_argument("--step_tokens", type=positive_int, default=32768, help="tokens per optimizer step, over all GPUs")
    run.add_argument("--tokens", type=positive_int, help="tokens of the run (default: 20 per parameter)")
    run.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16"), default="bfloat16", help="autocast precision"
    )
    run.add_argument("--optimizer", choices=("adamw", "muon", "adamw8bit"), default="adamw")
    machine = parser.add_argument_group("machine")
    machine.add_argument("--gpus", type=positive_int, default=1, help="number of GPUs")
    machine.add_argument("--gpu", choices=GPU_NAMES, default="a100", help="type of GPU")
    machine.add_argument(
        "--gpu_memory", type=memory_size, metavar="SIZE", help="memory per GPU, 24 or 24GB (default: from --gpu)"
    )
    machine.add_argument("--tflops", type=positive_float, help="peak per GPU, 10^12 operations/s (default: from --gpu)")
    machine.add_argument("--mfu", type=probability, default=0.35, help="fraction of the peak that is reached")
    machine.add_argument("--bandwidth", type=positive_float, default=25.0, help="GB/s that a GPU sends to the others")
    machine.add_argument("--price", type=positive_float, help="price of a GPU per hour")
    return parser.parse_args()


def main():
    args = get_args()
    from model import LMConfig  # here, since it brings torch, for which --help need not wait
    from scripts.planning.estimates import GPUS, Machines
    from scripts.planning.recommending import all_plans, recommend
    from scripts.planning.reporting_plans import describe_model, describe_plans, describe_run

    try:
        config = LMConfig(
            dim=args.dim,
            n_layers=args.n_layers,
            n_heads=args.n_heads,
            n_kv_heads=args.n_kv_heads,
            vocab_size=args.vocab_size,
            use_moe=args.use_moe,
        )
    except ValueError as error:
        raise UserError(f"no such model: {error}") from None
    gpu = GPUS[args.gpu]
    memory, flops = args.gpu_memory or gpu.memory, args.tflops * 1e12 if args.tflops else gpu.flops
    machines = Machines(args.gpus, gpu._replace(memory=memory, flops=flops), args.mfu, args.bandwidth * 1e9)
    step_rows = max(1, round(args.step_tokens / args.max_seq_len / args.gpus))
    plans = all_plans(config, machines, args.max_seq_len, step_rows, args.dtype != "float32", args.optimizer)
    print(describe_model(config, args.max_seq_len))
    if step_rows * args.gpus * args.max_seq_len > 1.5 * args.step_tokens:
        print(f"steps of {step_rows * args.gpus * args.max_seq_len:,} tokens, as each GPU needs at least one row")
    print(describe_plans(config, plans, machines, args.optimizer))
    print(describe_run(config, recommend(plans), machines, args, PER_MACHINE))
    if (args.n_heads, args.n_kv_heads, args.vocab_size) != (8, 2, 6400):
        print("note          train_pretrain.py trains 8 query and 2 key/value heads and the tokenizer's vocabulary:")
        print("              other numbers must be written into its configuration")


if __name__ == "__main__":
    run_main(main)
