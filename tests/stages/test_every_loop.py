"""The loop that all training scripts share: each of its properties is tested in every script."""

import contextlib
import dataclasses
import difflib
import math

import pytest
import torch
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from model import MiniMindLM
from tests.running import ROOT
from tests.stages.every_script import SCRIPTS, Run, Script, World, make_world
from tests.stages.failing import before_forward, failing_evaluation
from tests.stages.test_resume import assert_equal, state_of
from tests.stages.training import about, distance, reports, weights
from trainer.runtime import Runtime

EVALUATE = ("--eval_interval", "2", "--eval_path")


@pytest.fixture(scope="module")
def world(tiny_tokenizer, clip_dir, tmp_path_factory) -> World:
    return make_world(tmp_path_factory.mktemp("world"), tiny_tokenizer, clip_dir)


@pytest.fixture(scope="module", params=SCRIPTS, ids=lambda script: script.path.removesuffix(".py"))
def script(request) -> Script:
    return request.param


@dataclasses.dataclass
class Step:
    """The input of one optimizer step, and its result."""

    norm: float  # the norm of all gradients together
    rate: float
    before: list[torch.Tensor]  # the parameters
    after: list[torch.Tensor]


@contextlib.contextmanager
def watching_steps():
    """The list of `Step`s that AdamW takes from now on."""
    steps: list[Step] = []

    def parameters(optimizer) -> list[torch.Tensor]:
        return [p for group in optimizer.param_groups for p in group["params"]]

    def before(optimizer, *_):
        given = [p.grad.double().norm() for p in parameters(optimizer) if p.grad is not None]
        norm = torch.stack(given).norm().item()
        (rate,) = {group["lr"] for group in optimizer.param_groups}
        steps.append(Step(norm, rate, [p.detach().clone() for p in parameters(optimizer)], []))

    def after(optimizer, *_):
        steps[-1].after = [p.detach().clone() for p in parameters(optimizer)]

    hooks = (
        register_optimizer_step_pre_hook(before),
        register_optimizer_step_post_hook(after),
    )
    try:
        yield steps
    finally:
        for hook in hooks:
            hook.remove()


@contextlib.contextmanager
def watching_forwards():
    """The list of the student's forward passes from now on: whether with gradients, and whether in training mode."""
    forwards: list[tuple[bool, bool]] = []
    with before_forward(lambda model: forwards.append((torch.is_grad_enabled(), model.training))):
        yield forwards


@dataclasses.dataclass
class Whole(Run):
    """An uninterrupted run of five steps, evaluated at 2, 4 and 5 and saved at 3 and 5, with everything observed."""

    steps: list[Step]
    forwards: list[tuple[bool, bool]]  # of the student: whether with gradients, whether in training mode


@pytest.fixture(scope="module")
def whole(world, script, tmp_path_factory) -> Whole:
    out = tmp_path_factory.mktemp("whole")
    with watching_steps() as steps, watching_forwards() as forwards:
        run = world.call(script, out, *EVALUATE, world.folder / script.data, "--save_interval", "3")
    return Whole(run.out, run.name, steps, forwards)


PACKED = ("--packing", "1", "--max_seq_len", "256")


@pytest.fixture(scope="module")
def experts(world, script, tmp_path_factory) -> Run:
    """A mixture of experts with packed rows, four per step."""
    out = tmp_path_factory.mktemp("experts")
    evaluate = (*EVALUATE, world.folder / script.data)
    return world.call(script, out, *PACKED, *evaluate, "--batch_size", "4", use_moe=True)


def assert_same_numbers(ours: Run, theirs: Run) -> None:
    """Check that every logged number and the weights agree up to the rounding of fp32 sums."""
    for our, their in zip(reports(ours.out, ours.name), reports(theirs.out, theirs.name), strict=True):
        assert our == pytest.approx(their, rel=2e-4, abs=1e-5)
    assert distance(weights(ours.out, ours.name), weights(theirs.out, theirs.name)) < 1e-4


def assert_saved(run: Run, parameters: list[torch.Tensor]) -> None:
    """Check that the weights on disk contain each of these parameters."""
    saved = list(weights(run.out, run.name).values())
    assert all(any(torch.equal(value, p) for value in saved) for p in parameters)


def story(run: Run) -> dict:
    """The json beside the weights, without fields that depend on the machine's speed."""
    told = about(run.out, run.name)
    return told | {"seconds": None, "metrics": told["metrics"] | {"tokens_per_second": None}}


def evaluations(run: Run) -> list[dict]:
    return [line for line in reports(run.out, run.name) if any(key.startswith("eval_") for key in line)]


def gradient_norms(run: Run) -> list[float | None]:
    return [line["grad_norm"] for line in reports(run.out, run.name) if "grad_norm" in line]


# ---------------------------------------------------------------------------------------------- an optimizer step


def test_accumulation_takes_the_steps_of_a_big_batch(world, script, whole, tmp_path):
    """With micro-batches that differ in their number of target tokens."""
    cut = ("--batch_size", "2", "--accumulation_steps", "4")
    assert_same_numbers(world.call(script, tmp_path, *EVALUATE, world.folder / script.data, *cut), whole)


def test_two_processes_that_accumulate_take_the_steps_of_one(world, script, experts, tmp_path):
    cut = (*PACKED, *EVALUATE, world.folder / script.data, "--batch_size", "1", "--accumulation_steps", "2")
    world.start(script, tmp_path, *cut, use_moe=True, processes=2)
    assert_same_numbers(Run(tmp_path, experts.name), experts)


def test_a_step_is_taken_at_the_rate_that_the_schedule_gives_it(whole):
    rates = [5e-4, 1e-3, 1e-3, 5.5e-4, 1e-4]  # up to 1e-3 in two steps, then a half cosine down to a tenth
    assert [step.rate for step in whole.steps] == pytest.approx(rates)
    assert [line["lr"] for line in reports(whole.out, whole.name) if "lr" in line] == pytest.approx(rates)


def test_gradients_are_clipped_and_their_norm_before_that_is_told(world, script, whole, tmp_path):
    with watching_steps() as steps:
        run = world.call(script, tmp_path, "--max_steps", "1", "--grad_clip", "1e-4")
    assert [step.norm for step in steps] == pytest.approx([1e-4], rel=1e-2)  # + 1e-6, by which PyTorch divides
    assert gradient_norms(run) == pytest.approx(gradient_norms(whole)[:1])
    assert gradient_norms(run)[0] > 1e-3


def test_float16_unscales_the_gradient_before_it_is_clipped(world, script, whole, tmp_path):
    with watching_steps() as steps:
        run = world.call(script, tmp_path, "--dtype", "float16")
    told = [(ours, theirs) for ours, theirs in zip(gradient_norms(run), gradient_norms(whole), strict=True) if ours]
    assert len(told) >= 2  # the scaler may first have to find its scale, and a skipped step does not change the weights
    assert all(ours == pytest.approx(theirs, rel=0.5) for ours, theirs in told)
    assert [step.norm for step in steps] == pytest.approx([min(1.0, ours) for ours, _ in told], rel=1e-3)


def test_a_step_that_is_not_finite_is_skipped_and_counted(world, script, whole, tmp_path, monkeypatch):
    backward, calls = torch.Tensor.backward, []

    def spoiled(loss):
        calls.append(loss)
        backward(loss * math.nan if len(calls) == 2 else loss)

    monkeypatch.setattr(torch.Tensor, "backward", spoiled)
    with watching_steps() as steps:
        run = world.call(script, tmp_path, "--max_steps", "3")
    assert len(calls) == 3
    first, third = steps
    assert_equal(third.before, first.after)
    assert_saved(run, third.after)
    assert math.isfinite(third.norm)
    assert gradient_norms(run)[1] is None
    assert [line["skipped"] for line in reports(run.out, run.name)] == [0, 1, 1]
    assert (story(run)["step"], story(run)["skipped"]) == (3, 1)


# ------------------------------------------------------------------------------------------- saving and resuming


def test_what_is_saved_is_what_the_last_step_made(whole):
    """Also if --save_interval does not divide the number of steps."""
    assert len(whole.steps) == 5
    assert_saved(whole, whole.steps[-1].after)
    assert any(not torch.equal(a, b) for a, b in zip(whole.steps[-1].before, whole.steps[-1].after, strict=True))
    assert state_of(whole.out, whole.name)["progress"]["step"] == 5
    assert story(whole)["step"] == 5
    assert story(whole)["metrics"]["loss"] == reports(whole.out, whole.name)[-2]["loss"]
    last = max(whole.out.glob(f"{whole.name}.resume/step_*/model.json"))
    assert last.read_bytes() == (whole.out / f"{whole.name}.json").read_bytes()  # the last evaluation in both


def test_interrupted_and_resumed_is_as_if_never_interrupted(world, script, whole, tmp_path):
    flags = (*EVALUATE, world.folder / script.data, "--save_interval", "2")
    run = world.call(script, tmp_path, *flags, stop_after=3, exit_code=130)
    assert story(run)["step"] == 2
    assert_saved(run, whole.steps[1].after)
    with watching_steps() as steps:
        world.call(script, tmp_path, *flags, "--resume")
    assert len(steps) == 3
    assert_equal(state_of(run.out, run.name), state_of(whole.out, whole.name))
    assert_equal(weights(run.out, run.name), weights(whole.out, whole.name))
    assert reports(run.out, run.name) == reports(whole.out, whole.name)
    assert story(run) == story(whole)


# ------------------------------------------------------------------------------------------------------ evaluation


def test_evaluation_comes_at_its_steps_and_leaves_the_model_in_training_mode(whole):
    assert [line["step"] for line in evaluations(whole)] == [2, 4, 5]
    assert set(whole.forwards) == {(True, True), (False, False)}  # gradients and training mode go together
    assert sum(gradients for gradients, _ in whole.forwards) == 5
    last = evaluations(whole)[-1]
    assert story(whole)["metrics"].items() >= {key: last[key] for key in last if key.startswith("eval_")}.items()


@pytest.mark.parametrize("script", SCRIPTS[:1], ids=["train_pretrain"], indirect=True)
def test_the_json_tells_no_evaluation_of_later_weights(world, script, whole, tmp_path):
    flags = (*EVALUATE, world.folder / script.data, "--save_interval", "3")
    run = world.call(script, tmp_path, *flags, stop_after=4, exit_code=130)
    second, fourth = evaluations(run)
    assert fourth["step"] == 4
    assert story(run)["step"] == 3
    assert story(run)["metrics"]["eval_loss"] == second["eval_loss"]


def test_an_evaluation_that_fails_costs_an_evaluation(world, script, whole, tmp_path, capsys):
    with failing_evaluation(MemoryError("no room")), watching_forwards() as forwards:
        flags = (*EVALUATE, world.folder / script.data, "--save_interval", "3")
        run = world.call(script, tmp_path, *flags)
    told = [line for line in capsys.readouterr().err.splitlines() if line.startswith("evaluation at")]
    assert told == [f"evaluation at step {n} failed (MemoryError: no room)" for n in (2, 4, 5)]
    assert evaluations(run) == []
    assert all(training for gradients, training in forwards if gradients)
    assert_equal(weights(run.out, run.name), weights(whole.out, whole.name))
    assert story(run)["step"] == 5
    assert not any(key.startswith("eval_") for key in story(run)["metrics"])


def test_ctrl_c_in_an_evaluation_finds_the_step_saved(world, script, whole, tmp_path):
    with failing_evaluation(KeyboardInterrupt()):
        flags = (*EVALUATE, world.folder / script.data, "--save_interval", "2")
        run = world.call(script, tmp_path, *flags, exit_code=130)
    assert story(run)["step"] == 2
    assert_saved(run, whole.steps[1].after)


@pytest.mark.parametrize("script", [SCRIPTS[0], SCRIPTS[3]], ids=["train_pretrain", "train_dpo"], indirect=True)
def test_an_evaluation_that_fails_on_one_rank_keeps_no_other_waiting(world, script, tmp_path):
    """The second of two ranks, whose last step is a batch of padding."""
    flags = (*EVALUATE, world.folder / script.data, "--batch_size", "4")
    done = world.start(script, tmp_path, *flags, by=("tests/stages/failing.py",), processes=2)
    assert [line for line in done.stderr.splitlines() if line.startswith("evaluation at")] == [
        f"evaluation at step {n} failed (RuntimeError: of rank 1)" for n in (2, 4, 5)
    ]
    run = Run(tmp_path, script.name + "_32")
    assert evaluations(run) == []
    assert story(run)["step"] == 5


# ---------------------------------------------------------------------------------------------------- equal loops

PLAIN_LOSS = "loss = next_token_loss(out.logits, labels) / totals.target_tokens  # a sum over the tokens"
DIFFERENCES = {
    "train_distillation.py": (
        [PLAIN_LOSS],
        [
            "# loss_of(out.logits, batch, labels), a few rows at a time: 287 MiB at the peak instead of 549",
            "loss = sum_over_rows(loss_of, out.logits, batch, labels) / totals.target_tokens",
        ],
    ),
    "train_distill_reason.py": (
        [PLAIN_LOSS],
        [
            "weights = tag_weights(labels, tags, args.tag_weight)",
            "loss = weighted_next_token_loss(out.logits, labels, weights) / totals.target_tokens",
        ],
    ),
    "train_dpo.py": (
        [
            "step_loss = torch.zeros((), device=run.device)",
            PLAIN_LOSS,
            "step_loss += loss.detach()",
            "loss = run.sum(step_loss)",
            "if math.isfinite(loss + norm):",
            "progress.advance(totals, skipped=not math.isfinite(loss + norm))",
            "metrics.log(loss=loss, lr=lr, grad_norm=norm)",
            "metrics.log_evaluation(lambda: evaluate(model, held_out, tokenizer, run, args.batch_size))",
        ],
        [
            "pairs = run.sum(count_pairs(batches))  # a row holds whole pairs: chosen, rejected, chosen, rejected, …",
            "step_metrics = torch.zeros(len(DPO_METRICS), device=run.device)",
            'cached = batch.pop("reference", None)  # log-probabilities, where they were computed beforehand',
            "log_probs = token_log_probs(out.logits, labels)  # (target tokens,)",
            "reference_log_probs = reference_token_log_probs(cached, frozen, batch, labels)  # as many; no gradient",
            "policy = per_answer(log_probs, batch, labels)  # (pairs, 2): chosen, rejected",
            "reference = per_answer(reference_log_probs, batch, labels)  # (pairs, 2)",
            "losses, margins = dpo_loss(policy, reference, args.beta)  # (pairs,)",
            "loss = losses.sum() / pairs",
            "step_metrics += dpo_metrics(losses, margins, policy, log_probs - reference_log_probs, batch, labels)"
            " / pairs",
            "values = dict(zip(DPO_METRICS, run.sums(*step_metrics.tolist()), strict=True))",
            'if math.isfinite(values["loss"] + norm):',
            'progress.advance(totals, skipped=not math.isfinite(values["loss"] + norm))',
            "metrics.log(**values, lr=lr, grad_norm=norm)",
            "metrics.log_evaluation(",
            "lambda: evaluate_pairs(model, frozen, held_out, run, args.batch_size, per_answer, dpo_loss, args.beta)",
            ")",
        ],
    ),
}


VARIANTS = {  # pretraining's lines for DeepSeek's variants, and the lines without them
    "nats = next_token_loss(out.logits, labels)  # a sum over the tokens": None,
    "if out.mtp_loss is not None:  # with --mtp_depth, another sum": None,
    "nats = nats + out.mtp_loss": None,
    "loss = nats / totals.target_tokens": PLAIN_LOSS,
    "measured = {}": None,
    'if config.balance == "bias":  # no gradient leads there': None,
    'measured["violation"] = balance_experts(model, args.balance_rate * math.isfinite(loss + norm), run)': None,
    "metrics.log(loss=loss, lr=lr, grad_norm=norm, **measured)": "metrics.log(loss=loss, lr=lr, grad_norm=norm)",
}


def loop_of(path: str) -> list[str]:
    """The lines of a script, from the optimizer to the end."""
    text = (ROOT / path).read_text(encoding="utf-8")
    return text[text.index("    # Optimizer\n") :].splitlines()


def plain_loop() -> list[str]:
    """Pretraining's loop, without the lines that only its variants need."""
    lines = loop_of("train_pretrain.py")
    assert VARIANTS.keys() <= {line.strip() for line in lines}
    replaced = [(line, VARIANTS.get(line.strip(), line.strip())) for line in lines]
    return [
        line.replace(line.strip(), plain) if line.strip() else line for line, plain in replaced if plain is not None
    ]


def test_the_loops_are_one_but_for_what_makes_the_stage_different(script):
    """A fix in one of the copies must be made in all; intended differences are listed in the table above."""
    loop = plain_loop() if script.path == "train_pretrain.py" else loop_of(script.path)
    lines = list(difflib.ndiff(plain_loop(), loop))
    lacking, added = ([line[2:].strip() for line in lines if line.startswith(sign)] for sign in "-+")
    assert (lacking, added) == DIFFERENCES.get(script.path, ([], []))


def test_what_computes_has_been_put_on_the_device_and_so_has_what_it_is_given(world, script, tmp_path, monkeypatch):
    """A CPU run cannot show this by itself, because everything is already on the CPU. The run has one step in a single
    epoch, although --max_steps allows more."""
    moved, given, asked = [], set(), []
    to, call, to_device = MiniMindLM.to, MiniMindLM.__call__, Runtime.to_device

    def moving(self, *where, **how):
        moved.extend([self] * (torch.device("cpu") in where))
        return to(self, *where, **how)

    def giving(self, batch):
        there = to_device(self, batch)
        given.update(tensor.untyped_storage().data_ptr() for tensor in there.values())
        return there

    def asking(self, input_ids, *others, **named):
        asked.append((any(self is model for model in moved), input_ids.untyped_storage().data_ptr() in given))
        return call(self, input_ids, *others, **named)

    monkeypatch.setattr(MiniMindLM, "to", moving)
    monkeypatch.setattr(MiniMindLM, "__call__", asking)
    monkeypatch.setattr(Runtime, "to_device", giving)
    steps = ("--epochs", "1", "--batch_size", "40", "--max_steps", "3")
    run = world.call(script, tmp_path, *steps, *EVALUATE, world.folder / script.data, "--eval_interval", "1")
    assert about(run.out, run.name)["step"] == 1
    assert len(asked) > 1
    assert set(asked) == {(True, True)}
