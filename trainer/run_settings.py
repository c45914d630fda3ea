"""The settings that a resumed run must have: the same as before, or others with the same effect on training."""

import math
from collections.abc import Callable

from trainer.errors import UserError

# These change no number…
MAY_CHANGE = (
    *("out_dir", "device", "num_workers", "log_interval", "save_interval", "eval_interval", "eval_path", "resume"),
    *("overwrite", "compile", "gradient_checkpointing", "tracker", "use_wandb", "wandb_project", "local_rank", "ddp"),
    *("keep_last", "keep_every", "save_best", "save_minutes", "stop_after", "stall_timeout", "offload"),
    "skip_bad_lines",  # without it a file with bad lines is refused, and a stream stops at the first: the same rows
    *("data_path", "mix", "images_path", "cache_limit"),  # the data's content is compared, not its path
    *("dim", "n_layers", "use_moe", "tokenizer"),  # the architecture and the tokenizer's hash say it better,
    *("generation", "num_experts_per_tok", "rope_theta", "rope_scaling", "inference_rope_scaling"),  # and of these
)
# …these do, and are announced…
MAY_CHANGE_WITH_NOTICE = ("epochs", "max_steps", "learning_rate", "warmup_iters", "grad_clip", "dtype")
# …these share a step's rows and a model's state out among processes: the same rows in each step, sums in another order
SHARING = ("world_size", "deepspeed", "zero_stage", "fsdp")
ROWS_OF_A_STEP = ("batch_size", "accumulation_steps", "world_size")  # their product


def compare_settings(ours: dict, saved: dict, announce: Callable[[str], None]) -> None:
    """Refuse to resume with settings that would train a different run; announce those that change numbers slightly.

    Raises:
        UserError: a setting that may not change, or another number of rows per step.
    """
    changed = {name: (saved[name], value) for name, value in ours.items() if saved.get(name, value) != value}
    if changed.keys() & set(ROWS_OF_A_STEP):
        _compare_rows(ours, ours | saved)
    for name, (then, now) in changed.items():
        if name not in (*MAY_CHANGE_WITH_NOTICE, *SHARING, *ROWS_OF_A_STEP):
            raise UserError(
                f"--resume: the saved run had {name} {then}, this one has {now}; "
                "use the same value, or start over with --overwrite"
            )
    for name, (then, now) in changed.items():
        announce(f"--resume: {name} was {then} and is now {now}")
    if changed.keys() & {*SHARING, *ROWS_OF_A_STEP}:
        announce("--resume: each step has the same rows as before, summed in another order: equal up to rounding")


def _compare_rows(ours: dict, saved: dict) -> None:
    then, now = (math.prod(settings[name] for name in ROWS_OF_A_STEP) for settings in (saved, ours))
    if then == now:
        return
    batch, accumulation, processes = (saved[name] for name in ROWS_OF_A_STEP)
    each = then // ours["world_size"] if then % ours["world_size"] == 0 else None
    advice = f"with {ours['world_size']} processes, --batch_size x --accumulation_steps must be {each}"
    if each is None:
        advice = f"{then} rows cannot be divided among {ours['world_size']} processes: use {processes}"
    raise UserError(
        f"--resume: a step of the saved run had batch_size {batch} x accumulation_steps {accumulation} x {processes} "
        f"processes = {then} rows, this one has {now}: {advice}; or start over with --overwrite"
    )
