"""The default, least value and choices of every script's flags.

The numbers are repeated here on purpose: changing one changes what a user's command does.
"""

import argparse
import importlib
import runpy
from pathlib import Path

import pytest

from tests.running import ROOT
from trainer import errors
from trainer.errors import UserError

MODEL = {"dim": 512, "n_layers": 8, "use_moe": False, "tokenizer": None, "out_dir": "out"}
UNTOLD = {"num_experts_per_tok": None, "rope_theta": None, "inference_rope_scaling": False, "rope_scaling": None}
TOWER = {"vision_model": "model/vision_model/clip-vit-base-patch16"}
WRITING = {
    **{"max_new_tokens": 512, "temperature": 0.85, "top_p": 0.85, "top_k": 0, "repetition_penalty": 1.0, "seed": None}
}
TRAINING = {
    **MODEL | UNTOLD | {"generation": 2},
    **{"eval_path": None, "max_seq_len": 512, "packing": True, "skip_bad_lines": False, "num_workers": 0},
    **{"cache_limit": 50_000_000_000, "epochs": 1, "max_steps": 0, "accumulation_steps": 1, "optimizer": "adamw"},
    **{"grad_clip": 1.0, "seed": 42, "device": None, "dtype": None, "compile": None, "gradient_checkpointing": False},
    **{"deepspeed": None, "zero_stage": 2, "offload": None, "local_rank": None, "ddp": False, "save_interval": 100},
    **{"eval_interval": 100, "log_interval": 10, "resume": False, "overwrite": False, "tracker": None},
    **{"use_wandb": False, "wandb_project": "MiniMind", "save_minutes": 0, "keep_last": 2, "keep_every": 0},
    **{"save_best": False, "stop_after": 0, "stall_timeout": 0},
}


def stage(data: str, batch_size: int, learning_rate: float, warmup_iters: int, **own) -> dict:
    """A stage's defaults: the common ones and its own."""
    first = {"data_path": f"dataset/{data}.jsonl", "batch_size": batch_size, "learning_rate": learning_rate}
    return TRAINING | first | {"warmup_iters": warmup_iters} | own


VARIANTS = {
    **dict.fromkeys(("attention", "kv_latent_dim", "rope_head_dim", "hidden_dim", "n_routed_experts", "mtp_depth")),
    **{"n_shared_experts": None, "balance": None, "mtp": None, "balance_rate": 0.001, "mtp_weight": 0.3},
}
STREAM = {"stream": False, "stream_buffer": 8 << 20, "fsdp": False}
LOOKING = TOWER | {"cache_features": False}
ENGINE = {"model_mode": 1, "load": 0, "device": None, "lora_name": None}
DEFAULTS = {
    "train_pretrain": stage(
        *("pretrain_hq", 32, 1e-3, 50),
        **{"accumulation_steps": 2, "from_weight": "none", "mix": None, **STREAM, **VARIANTS},
    ),
    "train_full_sft": stage("sft_mini_512", 16, 3e-4, 20, from_weight="pretrain", mix=None, qat=None, **STREAM),
    "train_dpo": stage(
        *("dpo", 4, 1e-5, 20),
        **{"max_seq_len": 1024, "epochs": 2, "from_weight": "full_sft"},
        **{"beta": 0.1, "length_normalize": False, "cache_reference": True},
    ),
    "train_lora": stage(
        *("lora_identity", 16, 1e-3, 10),
        **{"epochs": 10, "from_weight": "full_sft", "mix": None, "lora_name": "identity"},
        **{"rank": 16, "alpha": None, "target_modules": None, "quantize": None},
    ),
    "train_distillation": stage(
        *("sft_1024", 16, 3e-4, 20),
        **{"from_weight": "full_sft", "mix": None, "teacher_weight": "full_sft_768", "alpha": 0.0, "temperature": 1.0},
    ),
    "train_distill_reason": stage(
        *("r1_mix_1024", 8, 3e-4, 20),
        **{"max_seq_len": 1024, "from_weight": "rlhf", "mix": None, "tag_weight": 10.0},
    ),
    "train_grpo": stage(
        *("rl_math", 8, 1e-5, 10),
        **{"max_seq_len": 1024, "packing": False, "from_weight": "reason", "group_size": 8, "max_new_tokens": 512},
        **{"rewards": ["format:0.2", "accuracy:1"], "temperature": 1.0, "loss": "grpo", "beta": 0.0, "epsilon": None},
        **{"epsilon_high": None, "updates_per_rollout": 1, "resample": None},
    ),
    "train_ppo": stage(
        *("rl_math", 64, 1e-5, 10),
        **{"max_seq_len": 1024, "packing": False, "from_weight": "reason", "max_new_tokens": 512, "temperature": 1.0},
        **{"rewards": ["format:0.2", "accuracy:1"], "reward_model": None, "gamma": 1.0, "gae_lambda": 0.95},
        **{"epsilon": 0.2, "value_epsilon": 0.2, "value_weight": 0.5, "beta": 0.05, "kl_target": 0.05},
        **{"updates_per_rollout": 2},
    ),
    "train_reward": stage(*("dpo", 4, 1e-4, 20), max_seq_len=1024, from_weight="full_sft"),
    "train_pretrain_vlm": stage(
        *("pretrain_vlm_data", 16, 4e-4, 0),
        **{"max_seq_len": 640, "epochs": 4, "images_path": "dataset/pretrain_images"} | LOOKING,
        **{"from_weight": "full_sft", "unfreeze_last": 0},
    ),
    "train_sft_vlm": stage(
        *("sft_vlm_data", 8, 1e-4, 20),
        **{"max_seq_len": 1536, "epochs": 6, "images_path": "dataset/sft_images"} | LOOKING,
        **{"from_weight": "pretrain_vlm", "multi": False},
    ),
    "eval_model": {
        **MODEL | UNTOLD | WRITING | ENGINE,
        **{"prompt": None, "system": None, "history_cnt": 0, "stream": True, "votes": 1, "verifier": None},
        **{"hide_thinking": False},
        **{"dtype": None, "deterministic": False, "compile": None, "speculate": 0, "draft": None},
        **{"open_thinking": False, "tools": None, "max_calls": 8, "mcp": None, "mcp_http": None, "yes": False},
    },
    "eval_vlm": {
        **MODEL | WRITING | TOWER | {"model_mode": 1, "load": 0, "device": None, "image": None, "prompt": None},
        **{"image_dir": "dataset/eval_images", "skip_bad_images": False, "system": None, "stream": True},
        **{"dtype": None, "deterministic": False, "compile": None, "speculate": 0, "draft": None},
    },
    "scripts.chat_openai_api": {
        **{"base_url": "http://127.0.0.1:8998/v1", "api_key": None, "model": None, "system": None},
        **{"history_cnt": None, "max_tokens": None, "temperature": None, "top_p": None, "seed": None},
        **{
            "stream": True,
            "hide_thinking": False,
            "tools": None,
            "max_calls": 8,
            "mcp": None,
            "mcp_http": None,
            "yes": False,
        },
    },
    "scripts.serve_openai_api": {
        **MODEL | UNTOLD | ENGINE | TOWER,
        **{"vlm": False, "fetch_images": False, "fetch_private": False, "dtype": "float32"},
        **{"deterministic": False, "compile": None, "speculate": 0, "draft": None},
        **{"max_concurrency": 16, "max_queue": 112, "host": "127.0.0.1", "port": 8998, "api_key": None, "cors": None},
        **{"keep_alive": 75, "drain_seconds": 30},
    },
    "scripts.tools": {"name": None, "arguments": "{}"},
    "scripts.train_clip": {
        **{"data_path": "dataset/demo/clip_captions.jsonl", "eval_path": "dataset/demo/eval_clip.jsonl"},
        **{"images_path": "dataset/demo/images", "skip_bad_lines": False, "out_dir": "out/demo/clip"},
        **{"overwrite": False, "image_size": 64, "patch_size": 16, "width": 192, "layers": 4, "steps": 1000},
        **{"batch_size": 256, "learning_rate": 1.5e-3, "warmup_iters": 50, "log_interval": 50},
        **{"device": None, "dtype": None, "seed": 42},
    },
    "scripts.serving.page": TOWER
    | {
        **{"out_dir": "out", "tokenizer": None, "device": None, "base_url": "http://127.0.0.1:8998/v1"},
    },
    "scripts.inspect_data FILE": TOWER
    | {
        **{"data_path": "FILE", "stage": None, "tokenizer": None, "max_seq_len": None, "samples": 3, "seed": None},
        **{"skip_bad_lines": False, "images_path": "dataset", "plot": None},
    },
    "scripts.prepare_data FILE --stage=sft --out=x.jsonl --workers=3": {
        **{"inputs": ["FILE"], "stage": "sft", "out": "x.jsonl", "overwrite": False, "workers": 3, "seed": 42},
        **{"map": None, "text_unit": "document", "source": [], "languages": ("zh", "en"), "language_share": None},
        **dict.fromkeys(("min_chars", "max_chars", "min_tokens", "max_tokens", "max_repeated", "max_runs")),
        **dict.fromkeys(("max_symbols", "max_digits", "max_broken", "boilerplate", "drop_refusals", "drop_cut_off")),
        **dict.fromkeys(("check_turns", "check_thoughts", "urls", "emails", "phones", "ids", "normalise")),
        **{"exact_dup": True, "near_dup": None, "near_dup_questions": None, "against": [], "ppl_model": None},
        **{"drop_worst": 0.1, "device": None, "mix": [], "max_lines": 0, "shuffle": True, "val_share": 0.01},
        **{"val_lines": 2000, "shard_lines": 0, "tokenizer": None, "count_tokens": False},
    },
    "scripts.inspect_checkpoint": {"path": "out"},
    "scripts.rejection_sampling FROM TO": {
        **MODEL | {"questions": "FROM", "answers": "TO", "pairs": None, "from_weight": "grpo", "seed": 42},
        **{
            "device": None,
            "accept": ["format:1", "accuracy:1"],
            "samples": 8,
            "most": 1,
            "temperature": 1.0,
            "max_new_tokens": 512,
        },
        **{"max_seq_len": 1024, "batch_size": 16, "limit": None, "skip_bad_lines": False, "overwrite": False},
    },
    "scripts.cache list": {"action": "list", "folders": [], "all": False, "older_than": None, "name": None},
    "scripts.eval_benchmarks --tasks cmmlu": {
        **MODEL | UNTOLD | {"tasks": ["cmmlu"], "data_dir": None, "num_fewshot": 0, "limit": None, "prompt": ["raw"]},
        **{"control": None, "seed": 1234, "ppl": [], "window": 512, "compare": None, "weights": [], "model_mode": 1},
        **{"load": 0, "lora_name": None, "batch_size": 16, "device": None, "output": None, "log_samples": None},
        **{"submission": None, "resume": False, "overwrite": False},
    },
    "scripts.report": {
        **{"out_dir": None, "tokenizer": None, "ppl": None, "data_dir": None, "num_fewshot": 0, "limit": None},
        **{"device": None},
    },
    "scripts.collect_teacher_answers FROM TO --model m": {
        **{"questions": "FROM", "answers": "TO", "model": "m", "base_url": "https://api.openai.com/v1"},
        **{"api_key": None, "system": None, "temperature": None, "max_tokens": None, "thinking": False},
        **{"concurrency": 8, "retries": 6, "give_up_after": 10, "timeout": 300, "skip_bad_lines": False},
    },
}
MEASURED = {"dim": 512, "n_layers": 8, "use_moe": False, "device": None}
DEFAULTS |= {
    "scripts.plan": {
        **{"dim": 512, "n_layers": 8, "use_moe": False, "n_heads": 8, "n_kv_heads": 2, "vocab_size": 6400},
        **{"max_seq_len": 512, "step_tokens": 32768, "tokens": None, "dtype": "bfloat16", "optimizer": "adamw"},
        **{"gpus": 1, "gpu": "a100", "gpu_memory": None, "tflops": None, "mfu": 0.35, "bandwidth": 25.0, "price": None},
    },
    "scripts.make_demo_data": {"out_dir": "dataset/demo", "seed": 42},
    "scripts.make_demo_images": {"out_dir": "dataset/demo", "seed": 42, "scale": 1.0, "eval_images": False},
    "scripts.train_tokenizer --data_path FILE": {
        **{"data_path": [Path("FILE")], "out_dir": "model/minimind_tokenizer", "vocab_size": 6400, "holdout": 0.1},
        **{"overwrite": False, "only_measure": False},
    },
    "scripts.contact_sheet": {
        **{"out": "out/demo/contact_sheet.png", "data_dir": "dataset/demo", "out_dir": "out/demo", "dim": 256},
        **{"count": 24, "columns": 6, "seed": 1},
    },
    "benchmarks.few_bits W --ppl=FILE": {
        **{"weights": ["W"], "ppl": "FILE", "limit": None, "tokenizer": None, "plot": None},
    },
    "benchmarks.generate": MEASURED
    | {"dtype": ["float32", "bfloat16"], "tokens": 128, "rounds": 5, "deterministic": False, "compile": True},
    "benchmarks.constrained": {
        **{"answers": 1000, "dim": 512, "n_layers": 8, "tokens": 100, "rounds": 5, "device": None},
    },
    "benchmarks.drafts": {
        **{"dim": 512, "n_layers": 8, "dtype": "float32", "device": None, "compile": True},
        **{"tokens": 256, "rounds": 5, "speculate": 16, "agreement": 0.8},
    },
    "benchmarks.train_throughput --data_path FILE": {
        **MEASURED | {"data_path": "FILE", "batch_size": 8, "max_seq_len": 512, "rounds": 5, "seconds": 12},
        **{"compile": True, "optimizer": "adamw", "stage": "pretrain", "dtype": None, "peak_tflops": None},
    },
    "benchmarks.serve_load": {
        **MODEL | {"clients": 64, "seconds": 300, "max_concurrency": 16, "dtype": "float32", "random_weights": False},
    },
    "benchmarks.eval_speed --data_dir DIR": {
        **MEASURED | {"data_dir": "DIR", "num_fewshot": 5, "limit": 16, "batch_size": 16, "rounds": 3},
    },
    "benchmarks.distillation_memory": {
        **{"batch_size": 8, "max_seq_len": 512, "learned": 0.5, "dtype": "bfloat16", "device": None, "rounds": 3},
    },
    "benchmarks.training_memory": {
        **{"dim": 512, "n_layers": 8, "use_moe": False, "batch_size": 8, "max_seq_len": 512, "dtype": "bfloat16"},
        **{
            "optimizer": "adamw",
            "adapter": None,
            "deepspeed": None,
            "offload": None,
            "zero_stage": 2,
            "rounds": 5,
            "device": None,
        },
        **{"seed": 42, "grad_clip": 1.0, "learning_rate": 1e-4, "fsdp": False},
        **{"stop_after": 0, "save_minutes": 0, "stall_timeout": 0},
    },
    "benchmarks.stream_start": {"size": 20_000_000_000, "rounds": 3, "num_workers": 0, "folder": None},
    "benchmarks.first_step --data_path FILE": {"data_path": "FILE", "starts": 3, "flags": []},
    "benchmarks.distillation_gain": {"seeds": 3, "epochs": "3", "lines": None},
    "benchmarks.faults": {"rounds": 60, "seed": 0, "kind": None},
    "benchmarks.save_cost": {"rounds": 3, "shapes": ["26M", "104M"], "folder": None, "device": None},
    "benchmarks.time_to_loss --data_path FILE": {
        **{"data_path": "FILE", "variant": "muon", "table": False, "seed": 1, "size": "7M", "tokens": 400_000},
        **{"batch_size": 8, "max_seq_len": 512, "learning_rate": 2e-3, "warmup_iters": 10, "tokenizer": None},
        **{"out_dir": "out/time_to_loss", "device": None},
    },
    "benchmarks.generations --data_path FILE": {
        **{"data_path": "FILE", "size": "26M", "minutes": 20.0, "seed": 1, "batch_size": 8, "max_seq_len": 512},
        **{"learning_rate": 1e-3, "optimizer": "muon", "dtype": "float32", "use_moe": 0, "tokenizer": None},
        **{"out_dir": "out/generations", "device": None},
    },
    "benchmarks.architectures --data_path FILE --row mla": {
        **{
            "data_path": "FILE",
            "row": "mla",
            "seed": 1,
            "minutes": 4.0,
            "steps": 0,
            "batch_size": 8,
            "max_seq_len": 256,
        },
        **{"learning_rate": 2e-3, "optimizer": "muon", "dtype": "float32", "balance_rate": 0.001, "mtp_weight": 0.3},
        **{"tokenizer": None, "out_dir": "out/architectures", "device": None},
    },
    "benchmarks.long_context --weights W --data_path D": {
        **{"weights": "W", "data_path": "D", "tokenizer": None, "trained": None, "longest": 8192, "rows": 4},
        **{"needles": 8, "finetune_steps": 0, "finetune_len": 2048, "learning_rate": 2e-4},
        **{"ways": ["none", "linear", "ntk", "yarn"], "seed": 1, "out_dir": "out/long_context", "device": None},
    },
    "benchmarks.rl_gain": {"seed": 1, "problems": None},
    "scripts.demo_r1": {"seed": 42},
    "scripts.demo_tools": {"seed": 42},
    "benchmarks.real_text --data_dir DIR": {"data_dir": "DIR", "steps": 120},
}
SIZES = dict.fromkeys(
    (
        *("dim", "n_layers", "n_heads", "n_kv_heads", "num_experts_per_tok", "max_seq_len", "use_moe", "rope_theta"),
        "inference_rope_scaling",
    )
)
CONVERSIONS = {
    "to-transformers weights folder": SIZES | {"lora": None},
    "from-transformers folder out": {},
    "to-gguf weights out": SIZES | {"dtype": "f16"},
    "merge-lora weights adapter out": SIZES,
    "to-peft weights adapter folder": SIZES | {"layout": "llama"},
    "from-peft folder weights out": SIZES,
}
for line, own in CONVERSIONS.items():
    command, *paths = line.split()
    DEFAULTS[f"scripts.convert_model {line}"] = {
        **own,
        **{"command": command, "tokenizer": None, "overwrite": False},
        **{path: path for path in paths},
    }


def arguments(line: str, monkeypatch) -> dict:
    """A script's parsed arguments; paths are text, those in the repository relative to its root."""
    name, *_ = typed = line.split()
    monkeypatch.setattr("sys.argv", typed)
    module = importlib.import_module(name)
    args = vars(module.get_args() if hasattr(module, "get_args") else _parsed_by(module.main, monkeypatch))
    inside = {name: str(value).removeprefix(f"{ROOT}/") for name, value in args.items() if _is_path(value)}
    return args | inside


def _parsed_by(main, monkeypatch) -> argparse.Namespace:
    """The parsed arguments of a script that parses them in `main`, which is stopped there."""

    class Parsed(Exception):
        pass

    def parse(*given):
        raise Parsed(parse_args(*given))

    parse_args = argparse.ArgumentParser.parse_args
    with monkeypatch.context() as patched:
        patched.setattr(argparse.ArgumentParser, "parse_args", parse)
        with pytest.raises(Parsed) as stopped:
            main()
    return stopped.value.args[0]


def _is_path(value) -> bool:
    return hasattr(value, "suffix") or (isinstance(value, str) and value.startswith(f"{ROOT}/"))


@pytest.mark.parametrize("line", DEFAULTS)
def test_what_a_script_does_where_nothing_is_said(line, monkeypatch):
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    assert arguments(line, monkeypatch) == DEFAULTS[line]


COMMANDS = [path for folder in (".", "scripts", "benchmarks") for path in sorted((ROOT / folder).glob("[a-z]*.py"))]


@pytest.mark.parametrize("path", COMMANDS, ids=lambda path: path.stem)
def test_a_command_begins_where_errors_are_told_in_one_line(path: Path, monkeypatch):
    begun = []
    monkeypatch.setattr(errors, "run_main", begun.append)
    main = runpy.run_path(str(path), run_name="__main__")["main"]
    assert begun == [main]


INTEGERS_FROM_1 = """
    dim n_layers max_seq_len epochs batch_size accumulation_steps save_interval log_interval keep_last
""".split()
INTEGERS_FROM_0 = "num_workers max_steps warmup_iters eval_interval seed keep_every".split()
NUMBERS_FROM_0 = "save_minutes stop_after stall_timeout".split()
ABOVE_0 = "learning_rate grad_clip".split()
LEAST = {
    "train_full_sft": {
        **dict.fromkeys(INTEGERS_FROM_1, 1) | dict.fromkeys([*INTEGERS_FROM_0, *NUMBERS_FROM_0], 0),
        **dict.fromkeys(ABOVE_0),
    },
    "train_dpo": {"beta": None},
    "train_lora": {"rank": 1},
    "train_distillation": {"temperature": None},
    "train_grpo": {
        **{"group_size": 1, "max_new_tokens": 1, "updates_per_rollout": 1, "resample": 0, "beta": 0},
        **dict.fromkeys(("temperature", "epsilon", "epsilon_high")),
    },
    "train_ppo": {
        **{"max_new_tokens": 1, "updates_per_rollout": 1, "beta": 0},
        **dict.fromkeys(
            ("temperature", "gamma", "gae_lambda", "epsilon", "value_epsilon", "value_weight", "kl_target")
        ),
    },
    "train_pretrain_vlm": {"unfreeze_last": 0},
    "eval_model": {
        **{"max_new_tokens": 1, "temperature": 0, "top_p": None, "top_k": 0, "repetition_penalty": None, "seed": 0},
        **{"history_cnt": 0, "votes": 1, "speculate": 0, "max_calls": 1},
    },
    "scripts.chat_openai_api": {"history_cnt": 0, "max_tokens": 1, "seed": 0, "max_calls": 1},
    "scripts.serve_openai_api": {"max_concurrency": 1, "max_queue": 0, "port": 0, "keep_alive": 1, "drain_seconds": 0},
    "scripts.inspect_data FILE": {"max_seq_len": 1, "samples": 0, "seed": 0},
    "scripts.prepare_data FILE --stage=sft --out=x.jsonl": {
        **{"workers": 1, "seed": 0, "min_chars": 0, "max_chars": 0, "min_tokens": 0, "max_tokens": 0, "boilerplate": 0},
        **{"language_share": 0, "max_repeated": 0, "max_runs": 0, "near_dup": 0, "drop_worst": 0, "max_lines": 0},
        **{"val_share": 0, "val_lines": 0, "shard_lines": 0},
    },
    "scripts.rejection_sampling a b": {
        **dict.fromkeys(("samples", "most", "max_new_tokens", "max_seq_len", "batch_size", "limit"), 1),
        **{"temperature": None, "seed": 0},
    },
    "scripts.cache list": {"older_than": 0},
    "scripts.plan": {
        **dict.fromkeys(("dim", "n_layers", "n_heads", "n_kv_heads", "vocab_size", "max_seq_len", "step_tokens"), 1),
        **{"tokens": 1, "gpus": 1, "tflops": None, "mfu": None, "bandwidth": None, "price": None},
    },
    "scripts.eval_benchmarks --tasks a": {"num_fewshot": 0, "limit": 1, "seed": 0, "window": 1, "batch_size": 1},
    "scripts.report": {"num_fewshot": 0, "limit": 1},
    "scripts.collect_teacher_answers a b --model m": {
        **{"max_tokens": 1, "concurrency": 1, "retries": 0, "give_up_after": 1, "timeout": None}
    },
}


@pytest.mark.parametrize(
    ("line", "flag", "least"), [(line, flag, least) for line, flags in LEAST.items() for flag, least in flags.items()]
)
def test_the_least_that_a_flag_takes(line, flag, least, monkeypatch):
    """None stands for any value above 0."""
    taken, refused = (0.001, 0) if least is None else (least, least - 1)
    assert arguments(f"{line} --{flag}={taken}", monkeypatch)[flag] == taken
    with pytest.raises(UserError, match=f"--{flag}"):
        arguments(f"{line} --{flag}={refused}", monkeypatch)


CHOICES = {
    "train_full_sft": {
        "dtype": ["float32", "bfloat16", "float16"],
        "optimizer": ["auto", "adamw", "muon", "adamw8bit"],
        "zero_stage": [0, 1, 2, 3],
        "offload": ["optimizer", "all"],
        "tracker": ["wandb", "swanlab", "tensorboard"],
        "qat": ["int8", "int4"],
    },
    "train_lora": {"quantize": ["nf4"]},
    "train_grpo": {"loss": ["grpo", "dr_grpo", "dapo", "gspo", "cispo"]},
    "eval_model": {"model_mode": [0, 1, 2, 3, 4, 5], "load": [0, 1], "dtype": ["float32", "bfloat16", "int8", "int4"]},
    "eval_vlm": {"model_mode": [0, 1, 2], "load": [0, 1]},
    "scripts.serve_openai_api": {
        "model_mode": [0, 1, 2, 3, 4, 5],
        "load": [0, 1],
        "dtype": ["float32", "bfloat16", "int8", "int4"],
    },
    "scripts.plan": {
        "dtype": ["float32", "bfloat16", "float16"],
        "optimizer": ["adamw", "muon", "adamw8bit"],
        "gpu": ["rtx3090", "rtx4090", "l40s", "a100", "h100", "h200", "b200"],
    },
    "scripts.inspect_data FILE": {"stage": ["pretrain", "sft", "lora", "distill", "reason", "dpo", "vlm"]},
    "scripts.eval_benchmarks --tasks a": {"model_mode": [0, 1, 2, 3, 4, 5], "load": [0, 1], "control": ["shuffle"]},
    "scripts.convert_model to-gguf a b": {"dtype": ["f32", "f16", "bf16", "q8_0", "q4_0"]},
    "scripts.convert_model to-peft a b c": {"layout": ["llama", "minimind"]},
}


@pytest.mark.parametrize(("line", "flag"), [(line, flag) for line, flags in CHOICES.items() for flag in flags])
def test_what_a_flag_chooses_among(line, flag, monkeypatch):
    several = CHOICES[line][flag]
    for one in several:
        assert arguments(f"{line} --{flag} {one}", monkeypatch)[flag] == one
    for other in ("other", -1, len(several)):
        with pytest.raises(UserError, match=f"--{flag}"):
            arguments(f"{line} --{flag}={other}", monkeypatch)


def test_what_may_be_said_more_than_once(monkeypatch):
    mix = arguments("train_pretrain --mix a.jsonl:0.7 C:\\b.jsonl:30", monkeypatch)["mix"]
    assert mix == [("a.jsonl", 0.7), ("C:\\b.jsonl", 30)]
    for line in ("eval_model --prompt a --prompt b", "eval_vlm --prompt a --prompt b"):
        assert arguments(line, monkeypatch)["prompt"] == ["a", "b"]
    assert arguments("eval_vlm --image a --image b", monkeypatch)["image"] == ["a", "b"]
    assert arguments("scripts.serve_openai_api --cors a --cors b", monkeypatch)["cors"] == ["a", "b"]


def test_deepspeed_goes_with_a_file_or_without_one(monkeypatch):
    assert arguments("train_pretrain --deepspeed", monkeypatch)["deepspeed"] is True
    assert arguments("train_pretrain --deepspeed ds.json", monkeypatch)["deepspeed"] == "ds.json"


def test_a_script_that_is_to_free_caches_is_told_which(tmp_path, monkeypatch):
    with pytest.raises(UserError, match=r"^free what\? --all, --older_than DAYS or --name TEXT$"):
        arguments("scripts.cache free", monkeypatch)
    for which in ("--all", "--older_than=0", "--name=a"):
        assert arguments(f"scripts.cache free {which}", monkeypatch)["action"] == "free"
    with pytest.raises(UserError, match="nowhere is not a folder"):
        arguments(f"scripts.cache list {tmp_path}/nowhere", monkeypatch)
