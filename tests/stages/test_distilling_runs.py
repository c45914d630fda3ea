"""train_distillation.py and train_distill_reason.py, run for real: one process, two, with ZeRO, interrupted."""

import json

import pytest
import torch

from model import LMConfig, MiniMindLM
from tests.conftest import write_jsonl
from tests.running import TINY_TRAINING, call_script, run_script

STAGES = {
    # an MoE student of a wider and deeper dense teacher
    "full_dist": ("train_distillation.py", "_moe", ("--teacher_weight", "teacher", "--alpha", "0.3", "--use_moe")),
    "reason": ("train_distill_reason.py", "", ("--from_weight", "full_sft", "--tag_weight", "7")),
}
COMMON = (
    *TINY_TRAINING,
    "--max_seq_len",
    "128",
    "--epochs",
    "9",
    "--max_steps",
    "4",
    "--save_interval",
    "1",
    "--learning_rate",
    "1e-3",
)


class Stage:
    """One of the two scripts, with the weights that it starts from."""

    def __init__(self, name: str, base, tokenizer_dir):
        self.name = name
        self.script, self.suffix, self.flags = STAGES[name]
        self.base = base
        self.flags = (*COMMON, *self.flags, "--tokenizer", tokenizer_dir, "--data_path", base / "r1_mix_1024.jsonl")

    def in_folder(self, out):
        """The flags to run it in `out`, where the weights that it starts from are copied."""
        out.mkdir(exist_ok=True)
        for file in self.base.glob("*.pth"):
            (out / file.name).symlink_to(file)
        return ("--out_dir", out, *self.flags)

    def weights(self, out):
        return torch.load(out / f"{self.name}_32{self.suffix}.pth", weights_only=True)


@pytest.fixture(scope="module")
def base(tiny_tokenizer, tmp_path_factory):
    """Random student and teacher weights without a json, as if downloaded; sums with their steps."""
    out = tmp_path_factory.mktemp("base")
    torch.manual_seed(0)
    sizes = {"vocab_size": len(tiny_tokenizer)}
    torch.save(MiniMindLM(LMConfig(dim=32, n_layers=2, **sizes)).state_dict(), out / "full_sft_32.pth")
    torch.save(
        MiniMindLM(LMConfig(dim=32, n_layers=2, use_moe=True, **sizes)).state_dict(), out / "full_sft_32_moe.pth"
    )
    torch.save(MiniMindLM(LMConfig(dim=48, n_layers=3, **sizes)).state_dict(), out / "teacher.pth")
    lines = []
    for n in range(48):
        answer = f"<think>\n{n} + {n} = {2 * n}\n</think>\n<answer>\n{2 * n}\n</answer>"
        question = f"{n} + {n} = ?" + " The sea, the sky." * (n % 3)
        lines.append(
            {"conversations": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}
        )
    write_jsonl(out / "r1_mix_1024.jsonl", lines)
    return out


@pytest.fixture(scope="module", params=STAGES)
def stage(request, base, tokenizer_dir):
    return Stage(request.param, base, tokenizer_dir)


@pytest.fixture(scope="module")
def alone(stage, tmp_path_factory):
    """The result of four steps of `python SCRIPT`."""
    out = tmp_path_factory.mktemp(stage.name)
    run_script(stage.script, *stage.in_folder(out))
    return out


def assert_close(ours, theirs, atol):
    assert ours.keys() == theirs.keys()
    for key, value in ours.items():
        torch.testing.assert_close(value, theirs[key], atol=atol, rtol=0, msg=lambda text, key=key: f"{key}: {text}")


def test_it_trains_and_says_what_it_did(stage, base, alone):
    trained, start = stage.weights(alone), torch.load(base / f"full_sft_32{stage.suffix}.pth", weights_only=True)
    assert trained.keys() == start.keys()
    assert all(value.dtype == torch.float32 for value in trained.values())
    assert max((trained[key] - start[key]).abs().max() for key in start) > 1e-3
    about = json.loads((alone / f"{stage.name}_32{stage.suffix}.json").read_text(encoding="utf-8"))
    assert (about["stage"], about["step"]) == (stage.name, 4)


def test_two_processes_equal_one(stage, alone, tmp_path):
    run_script(stage.script, *stage.in_folder(tmp_path), "--batch_size", "2", processes=2)
    assert_close(stage.weights(tmp_path), stage.weights(alone), atol=2e-5)


def test_zero_equals_ddp(stage, alone, tmp_path):
    zero = ("--batch_size", "2", "--deepspeed", "--zero_stage", "2" if stage.name == "reason" else "3")
    run_script(stage.script, *stage.in_folder(tmp_path), *zero, processes=2)
    assert_close(stage.weights(tmp_path), stage.weights(alone), atol=2e-4)


def test_a_resumed_run_is_bit_for_bit_the_same(stage, alone, tmp_path, capsys):
    flags = stage.in_folder(tmp_path)
    call_script(stage.script, *flags, stop_after=2, exit_code=130)
    key = "layers.0.attention.wq.weight"
    assert not torch.equal(stage.weights(tmp_path)[key], stage.weights(alone)[key])
    other = ("--alpha", "0.4") if stage.name == "full_dist" else ("--tag_weight", "5")
    call_script(stage.script, *flags, "--resume", *other, exit_code=2)
    assert f"the saved run had {other[0][2:]} " in capsys.readouterr().err
    call_script(stage.script, *flags, "--resume")
    assert "resumed at step 2" in capsys.readouterr().out
    assert_close(stage.weights(tmp_path), stage.weights(alone), atol=0)


def test_a_run_does_not_go_on_with_another_teacher(base, tokenizer_dir, tmp_path, capsys):
    stage = Stage("full_dist", base, tokenizer_dir)
    flags = stage.in_folder(tmp_path)
    call_script(stage.script, *flags, stop_after=2, exit_code=130)
    teacher = torch.load(base / "teacher.pth", weights_only=True)
    (tmp_path / "teacher.pth").unlink()  # a link to the shared weights
    torch.save({key: value * 2 for key, value in teacher.items()}, tmp_path / "teacher.pth")
    call_script(stage.script, *flags, "--resume", exit_code=2)
    assert "the saved run had teacher_hash " in capsys.readouterr().err


def test_a_negative_tag_weight_is_refused(base, tokenizer_dir, tmp_path, capsys):
    stage = Stage("reason", base, tokenizer_dir)
    for weight in ("-1", "nan", "inf"):
        call_script(stage.script, *stage.in_folder(tmp_path / weight), "--tag_weight", weight, exit_code=2)
        assert f"--tag_weight {weight} must be 0 or more" in capsys.readouterr().err
