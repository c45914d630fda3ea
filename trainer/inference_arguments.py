"""The command line of everything that generates or scores with a trained model. Imports nothing heavy, so that --help
is quick."""

import argparse

from trainer.argument_types import (
    BooleanFlag,
    non_negative_float,
    non_negative_int,
    positive_float,
    positive_int,
    probability,
    seed,
)

STAGES = ("pretrain", "full_sft", "rlhf", "reason", "grpo", "ppo")  # by --model_mode
VLM_STAGES = ("pretrain_vlm", "sft_vlm", "sft_vlm_multi")  # likewise
PRECISIONS = ("float32", "bfloat16", "int8", "int4")  # of the weights of a model that writes
# The default sampling settings: of eval_*.py, the server, the web page, exported folders and GGUFs,
# the demo's tests. At OpenAI's own temperature of 1 a small model rambles. These differ on purpose:
# - the server's chats end where the model's context does, its completions after OpenAI's 16 tokens;
# - scripts/chat_openai_api.py leaves everything to the server it talks to;
# - `model.generate` and the engine's `Request`, which programs call, are greedy.
SAMPLING = {"max_new_tokens": 512, "temperature": 0.85, "top_p": 0.85, "top_k": 0, "repetition_penalty": 1.0}


def add_stage_arguments(parser, stages: tuple[str, ...] = STAGES, more: str = "") -> None:
    """--model_mode and --load, which select the weights in --out_dir, added to a parser or a group;
    `trainer.loading.load_by_flags` and `load_vlm_by_flags` read them.

    Args:
        stages: the stages that the numbers of --model_mode stand for.
        more: text to add to the help of --model_mode.
    """
    parser.add_argument(
        "--model_mode", type=int, choices=range(len(stages)), default=1, help=number_stages(stages) + more
    )
    parser.add_argument(
        "--load", type=int, choices=(0, 1), default=0, help="0: our .pth; 1: the transformers folder in --out_dir"
    )


def number_stages(stages: tuple[str, ...]) -> str:
    """The stages as the help of --model_mode lists them: 0 pretrain, 1 full_sft, …"""
    return ", ".join(f"{number} {stage}" for number, stage in enumerate(stages))


def add_adapter_argument(parser) -> None:
    """--lora_name, added to a parser or a group; `trainer.weights.find_adapter` finds the file."""
    parser.add_argument("--lora_name", default=None, metavar="NAME", help="LoRA adapter to load: out/lora/NAME_512.pth")


def add_sampling_arguments(parser: argparse.ArgumentParser) -> None:
    """The sampling flags; `sampling_settings` reads them."""
    group = parser.add_argument_group("writing")
    group.add_argument("--max_new_tokens", type=positive_int, help="maximum answer length in tokens")
    group.add_argument("--temperature", type=non_negative_float, help="sampling temperature; 0: greedy")
    group.add_argument(
        "--top_p", type=probability, help="nucleus sampling: keep the most likely tokens up to this probability"
    )
    group.add_argument("--top_k", type=non_negative_int, help="sample from this many most likely tokens; 0: no limit")
    group.add_argument("--repetition_penalty", type=positive_float, help="1: none")
    group.add_argument("--seed", type=seed, default=None, help="makes sampling reproducible")
    parser.set_defaults(**SAMPLING)


def sampling_settings(args: argparse.Namespace) -> dict:
    """The sampling settings of `model.generate` and `model.stream`, from the flags of `add_sampling_arguments`."""
    return {name: getattr(args, name) for name in (*SAMPLING, "seed")}


def add_engine_arguments(parser, dtype: str | None = None) -> None:
    """The flags of the inference engine, added to a parser or a group; `trainer.loading.open_engine` reads them.

    Args:
        dtype: the default of --dtype; None = as the weights are.
    """
    parser.add_argument(
        "--dtype",
        choices=PRECISIONS,
        default=dtype,
        help=f"precision of the weights in memory (default: {dtype or 'as saved'})",
    )
    parser.add_argument(
        "--deterministic",
        action=BooleanFlag,
        help="one kernel for any number of concurrent answers, not the fastest for each: "
        "an answer does not depend on the others",
    )
    parser.add_argument(
        "--compile",
        action=BooleanFlag,
        default=None,
        help="compile the decode step of a single answer: up to twice as fast on a CPU, "
        "half a minute at the first start (default: only in the server, for models of 10M parameters or more)",
    )
    parser.add_argument(
        "--speculate",
        type=non_negative_int,
        default=0,
        metavar="N",
        help="draft up to N tokens by prompt look-up and keep those that the model would generate: faster when an "
        "answer repeats its prompt (default: 0, off)",
    )
    parser.add_argument(
        "--draft",
        metavar="WEIGHTS",
        help="smaller model that drafts: a name in --out_dir, a .pth or a transformers folder",
    )
