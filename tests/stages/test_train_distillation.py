"""train_distillation.py: the loss compared with formulas, alpha at 0 and 1, and what is refused."""

import json
import shutil

import pytest
import torch
from torch.nn import functional as F

from model import LMConfig, MiniMindLM
from tests.running import TINY_TRAINING, call_script
from train_distillation import distillation_loss


@pytest.fixture
def some_logits():
    torch.manual_seed(0)
    return torch.randn(6, 5) * 2, torch.randn(6, 5) * 2, torch.tensor([0, 4, 2, 2, 1, 3])


def test_by_hand_on_two_tokens_and_a_vocabulary_of_two():
    """Teacher odds 3:1 and 1:1, student odds 1:1 and 1:3, at T = 1; T = 2 then halves every logit."""
    log3 = torch.tensor(3.0).log()
    teacher, student = torch.tensor([[log3, 0.0], [0.0, 0.0]]), torch.tensor([[0.0, 0.0], [0.0, log3]])
    targets = torch.tensor([0, 1])
    log = torch.log
    kl = 0.75 * log(torch.tensor(1.5)) + 0.25 * log(torch.tensor(0.5))  # (3/4, 1/4) against (1/2, 1/2)
    kl += 0.5 * log(torch.tensor(2.0)) + 0.5 * log(torch.tensor(2 / 3))  # (1/2, 1/2) against (1/4, 3/4)
    cross_entropy = -log(torch.tensor(0.5)) - log(torch.tensor(0.75))
    assert distillation_loss(student, teacher, targets, 0.0, 1.0).item() == pytest.approx(kl.item(), rel=1e-6)
    assert distillation_loss(student, teacher, targets, 1.0, 1.0).item() == pytest.approx(
        cross_entropy.item(), rel=1e-6
    )
    mixed = distillation_loss(student, teacher, targets, 0.3, 1.0).item()
    assert mixed == pytest.approx((0.3 * cross_entropy + 0.7 * kl).item(), rel=1e-6)
    root3 = torch.tensor(3.0).sqrt()
    high = root3 / (1 + root3)
    kl2 = high * log(2 * high) + (1 - high) * log(2 * (1 - high))
    kl2 += 0.5 * log(0.5 / high) + 0.5 * log(0.5 / (1 - high))
    torch.testing.assert_close(distillation_loss(student, teacher, targets, 0.0, 2.0), 4 * kl2)


@pytest.mark.parametrize(("alpha", "temperature"), [(0.0, 1.0), (0.25, 3.0), (1.0, 2.0)])
def test_against_torch_kl_div(some_logits, alpha, temperature):
    student, teacher, targets = some_logits
    student.requires_grad_()
    kl = F.kl_div(F.log_softmax(student / temperature, -1), F.softmax(teacher / temperature, -1), reduction="batchmean")
    expected = len(targets) * (alpha * F.cross_entropy(student, targets) + (1 - alpha) * temperature**2 * kl)
    (gradient,) = torch.autograd.grad(expected, student)
    loss = distillation_loss(student, teacher, targets, alpha, temperature)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(torch.autograd.grad(loss, student)[0], gradient)


def test_softmaxes_are_taken_in_fp32_whatever_the_logits_are(some_logits):
    student, teacher, targets = some_logits
    half = (student.bfloat16(), teacher.bfloat16())
    whole = [logits.float() for logits in half]
    assert torch.equal(distillation_loss(*half, targets, 0.3, 2.0), distillation_loss(*whole, targets, 0.3, 2.0))


def test_a_student_that_agrees_has_nothing_to_learn(some_logits):
    student, _, targets = some_logits
    student.requires_grad_()
    loss = distillation_loss(student, student.detach() + 3, targets, 0.0, 2.0)
    assert loss.item() == pytest.approx(0, abs=1e-6)
    assert torch.autograd.grad(loss, student)[0].abs().max() < 1e-6


def test_alpha_one_is_fine_tuning(tiny_out, tiny_data, tokenizer_dir, tmp_path):
    """Without the teacher's term the stage must do exactly the same as train_full_sft.py."""
    out = shutil.copytree(tiny_out, tmp_path, dirs_exist_ok=True)
    flags = (*TINY_TRAINING, "--out_dir", out, "--tokenizer", tokenizer_dir, "--max_steps", "3", "--epochs", "3")
    flags = (*flags, "--data_path", tiny_data / "sft_mini_512.jsonl", "--from_weight", "pretrain", "--overwrite")
    call_script("train_full_sft.py", *flags, "--learning_rate", "1e-3")
    alone = ("--learning_rate", "1e-3", "--teacher_weight", "full_sft_32", "--alpha", "1")
    call_script("train_distillation.py", *flags, *alone)
    taught, tuned = (torch.load(out / f"{name}_32.pth", weights_only=True) for name in ("full_dist", "full_sft"))
    for key, value in tuned.items():
        torch.testing.assert_close(taught[key], value, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (("--alpha", "1.5"), "--alpha 1.5 must be from 0"),
        (("--temperature", "0"), "argument --temperature: must be a number above 0, not 0"),
        (("--teacher_weight", "full_sft_768"), "full_sft_768.pth is missing: run train_full_sft.py"),
        (("--from_weight", "nothing"), "nothing_32.pth is missing"),
    ],
)
def test_flags_that_cannot_work(tiny_out, tokenizer_dir, tiny_data, flags, told, capsys):
    common = (*TINY_TRAINING, "--out_dir", tiny_out, "--tokenizer", tokenizer_dir)
    common = (*common, "--data_path", tiny_data / "sft_mini_512.jsonl", "--teacher_weight", "full_sft_32")
    call_script("train_distillation.py", *common, *flags, exit_code=2)
    error = capsys.readouterr().err
    assert told in error
    assert len(error.splitlines()) == 1
    assert not (tiny_out / "full_dist_32.pth").exists()


def test_a_teacher_with_another_tokenizer_is_refused_by_its_first_difference(
    tiny_out, tokenizer_dir, tiny_data, plain_tokenizer, tmp_path, capsys
):
    MiniMindLM(LMConfig(dim=32, n_layers=1, vocab_size=len(plain_tokenizer))).save_pretrained(tmp_path)
    plain_tokenizer.save_pretrained(tmp_path)
    common = (*TINY_TRAINING, "--out_dir", tiny_out, "--tokenizer", tokenizer_dir)
    common = (*common, "--data_path", tiny_data / "sft_mini_512.jsonl", "--teacher_weight", tmp_path)
    call_script("train_distillation.py", *common, exit_code=2)
    assert "id 3 is '<think>' for the student and '!' for the teacher" in capsys.readouterr().err


def test_a_frozen_teacher_lowers_the_held_out_loss(tiny_out, tiny_data, tokenizer_dir, tiny_tokenizer, tmp_path):
    """A random student comes nearer to the teacher; bf16, unpacked rows, a transformers folder."""
    out = shutil.copytree(tiny_out, tmp_path / "out")
    folder = tmp_path / "teacher"
    config = LMConfig(dim=32, n_layers=2, vocab_size=len(tiny_tokenizer))
    teacher = MiniMindLM(config)
    teacher.load_state_dict(torch.load(out / "full_sft_32.pth", weights_only=True))
    teacher.save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    torch.manual_seed(1)
    torch.save(MiniMindLM(config).state_dict(), out / "random_32.pth")
    flags = (*TINY_TRAINING, "--out_dir", out, "--tokenizer", tokenizer_dir, "--from_weight", "random")
    flags = (*flags, "--data_path", tiny_data / "sft_mini_512.jsonl", "--epochs", "9", "--max_steps", "20")
    flags = (*flags, "--learning_rate", "1e-2", "--dtype", "bfloat16", "--packing", "0", "--teacher_weight", folder)
    call_script("train_distillation.py", *flags)
    lines = (out / "full_dist_32.metrics.jsonl").read_text(encoding="utf-8").splitlines()
    losses = [json.loads(line)["loss"] for line in lines]
    assert losses[-1] < 0.5 * losses[0]
