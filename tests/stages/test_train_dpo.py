"""train_dpo.py: its loss compared with trl's code, and real runs with one and two processes."""

import json
import math
import shutil

import pytest
import torch

from dataset import DPODataset, collate
from model import LMConfig, MiniMindLM
from model.loss import target_mask
from tests.conftest import write_jsonl
from tests.dataset.test_dpo_dataset import pair, samples
from tests.running import TINY_TRAINING, one_error_line, run_script
from train_dpo import dpo_loss
from trainer.preference import DPO_METRICS, dpo_metrics, mean_per_answer, sum_per_answer, token_log_probs
from trainer.weights import read_settings

STEPS = ("--max_steps", "4", "--epochs", "9", "--learning_rate", "1e-2", "--max_seq_len", "96")  # two of them warm up


@pytest.fixture(scope="module")
def pairs_file(tmp_path_factory):
    records = [pair(f"What is {n} + {n}?", f"It is {2 * n}.", "I do not know. " * (1 + n % 3)) for n in range(30)]
    return write_jsonl(tmp_path_factory.mktemp("pairs") / "dpo.jsonl", records)


@pytest.fixture(scope="module")
def base(tiny_tokenizer, tmp_path_factory):
    """An --out_dir with a random full_sft_32, dense and MoE, without a json, as if downloaded."""
    out = tmp_path_factory.mktemp("base")
    torch.manual_seed(0)
    for use_moe in (False, True):
        config = LMConfig(dim=32, n_layers=2, vocab_size=len(tiny_tokenizer), use_moe=use_moe)
        torch.save(MiniMindLM(config).state_dict(), out / f"full_sft_32{'_moe' * use_moe}.pth")
    return out


@pytest.fixture
def out(base, tmp_path):
    return shutil.copytree(base, tmp_path / "out")


@pytest.fixture(scope="module")
def train(tokenizer_dir, pairs_file):
    """Runs train_dpo.py with a folder as --out_dir."""
    data = ("--tokenizer", tokenizer_dir, "--data_path", pairs_file)
    return lambda out, *flags, **how: run_script(
        "train_dpo.py", "--out_dir", out, *TINY_TRAINING, *data, *STEPS, *flags, **how
    )


@pytest.fixture(scope="module")
def alone(base, train, tmp_path_factory):
    """One process's result after four steps of a mixture of experts."""
    out = shutil.copytree(base, tmp_path_factory.mktemp("alone"), dirs_exist_ok=True)
    train(out, "--use_moe")
    return out


def weights(out):
    return torch.load(out / "rlhf_32_moe.pth", weights_only=True)


def measures(out, name="rlhf_32_moe"):
    return list(map(json.loads, (out / f"{name}.metrics.jsonl").read_text(encoding="utf-8").splitlines()))


def assert_close(ours, theirs, atol):
    assert ours.keys() == theirs.keys()
    for key, value in ours.items():
        torch.testing.assert_close(value, theirs[key], atol=atol, rtol=0, msg=lambda text, key=key: f"{key}: {text}")


def test_the_loss_by_hand():
    policy = torch.tensor([[-1.0, -2.0], [-3.0, -1.0]], requires_grad=True)
    reference = torch.tensor([[-1.5, -1.0], [-3.0, -1.0]])
    losses, margins = dpo_loss(policy, reference, beta=0.5)
    assert margins.tolist() == pytest.approx([0.75, 0.0])  # 0.5 * ((-1 + 1.5) - (-2 + 1))
    assert losses.tolist() == pytest.approx([math.log(1 + math.exp(-0.75)), math.log(2)])
    losses.sum().backward()  # beta * sigmoid(-margin), up for the chosen and down for the rejected
    pull = [0.5 / (1 + math.exp(0.75)), 0.25]
    assert policy.grad.flatten().tolist() == pytest.approx([-pull[0], pull[0], -pull[1], pull[1]])
    far, _ = dpo_loss(torch.tensor([[-1e4, 0.0]]), torch.zeros(1, 2), beta=1.0)
    assert far.item() == pytest.approx(1e4)  # and no overflow


@pytest.mark.parametrize("length_normalize", [False, True])
def test_loss_and_gradient_are_those_of_trl(length_normalize, pairs_file, tiny_tokenizer, tmp_path):
    """Our packed rows, and trl's padded batch of the same tokens in its own DPOTrainer."""
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer
    from trl.trainer.dpo_trainer import DataCollatorForPreference

    model, reference = (tiny_model(len(tiny_tokenizer), seed) for seed in (0, 1))
    data = DPODataset(pairs_file, tiny_tokenizer, max_seq_len=256)
    rows = [data[0], data[1]]
    batch = collate(rows, data.max_seq_len)
    labels = batch.pop("labels")
    values = [
        token_log_probs(each(**batch, logits_to_keep=target_mask(labels)).logits, labels) for each in (model, reference)
    ]
    per_answer = mean_per_answer if length_normalize else sum_per_answer
    policy, theirs = (per_answer(each, batch, labels) for each in values)
    losses, margins = dpo_loss(policy, theirs.detach(), beta=0.3)
    examples = [example for row in rows for example in trl_examples(row)]
    ours = losses.sum() / len(examples)
    ours.backward()
    gradients = {key: value.grad for key, value in model.named_parameters()}
    model.zero_grad()

    settings = DPOConfig(
        output_dir=str(tmp_path), use_cpu=True, bf16=False, report_to=[], beta=0.3, gradient_checkpointing=False,
        loss_type="sigmoid_norm" if length_normalize else "sigmoid",
    )  # fmt: skip
    lines = Dataset.from_list([{"prompt": "a", "chosen": "b", "rejected": "c"}])
    trainer = DPOTrainer(model, reference, args=settings, train_dataset=lines, processing_class=tiny_tokenizer)
    theirs = trainer.compute_loss(model, DataCollatorForPreference(pad_token_id=0)(examples))
    assert ours.item() == pytest.approx(theirs.item(), abs=1e-5)
    assert abs(theirs.item() - math.log(2)) > 1e-3  # the two models differ
    theirs.backward()
    for key, value in model.named_parameters():
        torch.testing.assert_close(gradients[key], value.grad, atol=1e-5, rtol=1e-3)

    logged = {name: values[-1] for name, values in trainer._metrics["train"].items()}
    sums = dpo_metrics(losses, margins, policy, values[0] - values[1], batch, labels)
    measured = dict(zip(DPO_METRICS, (sums / len(examples)).tolist(), strict=True))
    assert measured["loss"] == pytest.approx(ours.item())
    if not length_normalize:  # trl reports sums either way
        assert measured["chosen"] == pytest.approx(logged["logps/chosen"], rel=1e-5)
        assert measured["rejected"] == pytest.approx(logged["logps/rejected"], rel=1e-5)
        assert measured["margin"] == pytest.approx(logged["rewards/margins"], rel=1e-3)
        assert measured["reward_accuracy"] == pytest.approx(logged["rewards/accuracies"])


def tiny_model(vocab_size, seed):
    torch.manual_seed(seed)
    return MiniMindLM(LMConfig(dim=32, n_layers=2, vocab_size=vocab_size))


def trl_examples(row):
    """A row's pairs in the form of trl's collator; tokens after an answer's last target are left out."""
    sides = []
    for ids, labels in samples(row):
        learned = torch.nonzero(labels >= 0).flatten()
        begin, end = int(learned[0]), int(learned[-1]) + 1
        assert end - begin == len(learned)
        sides.append((ids[:begin].tolist(), ids[begin:end].tolist()))
    return [
        {"prompt_ids": prompt, "chosen_ids": chosen, "rejected_ids": rejected}
        for (prompt, chosen), (_, rejected) in zip(sides[::2], sides[1::2], strict=True)
    ]


def test_the_figures_by_hand():
    """One pair, with two target tokens in the chosen answer and one in the rejected."""
    batch = {"position_ids": torch.tensor([[0, 1, 2, 0, 1]]), "attention_mask": torch.ones(1, 5, dtype=torch.bool)}
    labels = torch.tensor([[-100, 7, 8, -100, 9]])
    policy, reference = torch.tensor([-1.0, -2.0, -4.0]), torch.tensor([-1.0, -4.0, -3.0])

    def measured(length_normalize):
        per_answer = mean_per_answer if length_normalize else sum_per_answer
        answers = per_answer(policy, batch, labels)
        losses, margins = dpo_loss(answers, per_answer(reference, batch, labels), beta=1.0)
        result = dpo_metrics(losses, margins, answers, policy - reference, batch, labels)
        return dict(zip(DPO_METRICS, result.tolist(), strict=True))

    summed, mean = measured(False), measured(True)
    kl = ((0 + 2**2) / 2 + 1 / 2) / 3
    assert summed == pytest.approx(
        {"loss": math.log(1 + math.exp(-3)), "reward_accuracy": 1, "accuracy": 1, "margin": 3.0}
        | {"chosen": -3.0, "rejected": -4.0, "kl": kl}
    )
    assert mean["margin"] == pytest.approx(2.0)
    assert (mean["chosen"], mean["rejected"], mean["kl"]) == pytest.approx((-1.5, -4.0, kl))


def test_training_prefers_the_better_answer(base, alone):
    lines = measures(alone)
    assert lines[0]["loss"] == pytest.approx(math.log(2), abs=1e-5)  # policy and reference still agree
    assert (lines[0]["margin"], lines[0]["kl"]) == pytest.approx((0, 0), abs=1e-5)
    assert lines[-1]["loss"] < 0.6
    assert lines[-1]["margin"] > 0.1
    assert lines[-1]["kl"] > 1e-3
    assert (alone / "full_sft_32_moe.pth").read_bytes() == (base / "full_sft_32_moe.pth").read_bytes()
    about = read_settings(alone / "rlhf_32_moe.pth")
    assert (about["stage"], about["step"], about["reference"]) == ("rlhf", 4, "full_sft_32_moe.pth")


def test_two_processes_equal_one(out, alone, train):
    train(out, "--use_moe", "--batch_size", "2", processes=2)
    assert_close(weights(out), weights(alone), atol=5e-5)


def test_zero_equals_one_process(out, alone, train):
    train(out, "--use_moe", "--batch_size", "2", "--deepspeed", "--zero_stage", "1", processes=2)
    assert_close(weights(out), weights(alone), atol=5e-4)


def test_a_live_reference_gives_what_the_cached_one_gives(out, alone, train):
    train(out, "--use_moe", "--no-cache_reference")
    for cached, live in zip(measures(alone), measures(out), strict=True):
        assert live["loss"] == pytest.approx(cached["loss"], abs=1e-5)
        assert live["kl"] == pytest.approx(cached["kl"], abs=1e-5)


def test_a_resumed_run_is_bit_for_bit_the_same(out, alone, train):
    train(out, "--use_moe", "--max_steps", "2")
    refused = train(out, "--use_moe", "--resume", "--beta", "0.2", exit_code=2)
    assert "the saved run had beta 0.1, this one has 0.2" in one_error_line(refused)
    assert "resumed at step 2" in train(out, "--use_moe", "--resume").stdout
    assert_close(weights(out), weights(alone), atol=0)

    start = torch.load(out / "full_sft_32_moe.pth", weights_only=True)
    torch.save(start | {"norm.weight": start["norm.weight"] + 1}, out / "full_sft_32_moe.pth")
    refused = train(out, "--use_moe", "--resume", exit_code=2)
    assert "the saved run had reference_hash" in one_error_line(refused)


def test_dense_unpacked_bf16_normalized_with_held_out_pairs(out, train, pairs_file):
    train(out, "--packing", "0", "--dtype", "bfloat16", "--length_normalize", "--beta", "2", "--eval_path", pairs_file,
          "--eval_interval", "3", "--batch_size", "8")  # fmt: skip
    first, last = (line for line in measures(out, "rlhf_32") if "eval_loss" in line)
    assert last["eval_loss"] < first["eval_loss"] < 0.7
    assert last["eval_accuracy"] >= first["eval_accuracy"]
    assert last["eval_reward_accuracy"] == 1
    assert last["eval_chosen"] > -8  # an average over tokens: a sum would be several times as large


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (("--beta", "0"), "--beta: must be a number above 0, not 0"),
        (("--from_weight", "nothing"), "nothing_32.pth is missing"),
        (("--max_seq_len", "8"), "no sample has a target within 8 tokens"),
    ],
)
def test_flags_that_cannot_work(out, train, flags, told):
    assert told in one_error_line(train(out, *flags, exit_code=2))
    assert not list(out.glob("rlhf*.pth"))
