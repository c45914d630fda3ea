"""The variants of docs/architectures.md, trained for real: from scratch, interrupted, with two processes, by a later
stage; and the combinations that are refused."""

import pytest
import torch

from tests.running import call_script
from tests.stages.training import about, distance, losses, reports, weights

MLA = ("--attention", "mla", "--mtp_depth", "1")
BIAS = (
    "--use_moe",
    "--balance",
    "bias",
    "--balance_rate",
    "0.02",
    "--n_routed_experts",
    "6",
    "--n_shared_experts",
    "2",
)
BIAS = (*BIAS, "--hidden_dim", "32", "--mtp_depth", "2", "--mtp", "parallel")
STEPS = ("--max_steps", "3")  # after four steps a bias may have returned to its start
KINDS = {"mla": ("pretrain_32", MLA), "bias": ("pretrain_32_moe", BIAS)}


@pytest.fixture(scope="module")
def trained(pretrain, tmp_path_factory):
    """An --out_dir with a model of each variant."""
    out = tmp_path_factory.mktemp("variants")
    for _, flags in KINDS.values():
        pretrain(out, *STEPS, *flags, by=call_script)
    return out


def test_the_json_says_what_it_is(trained):
    said = about(trained)["config"]
    assert (said["attention"], said["kv_latent_dim"], said["rope_head_dim"]) == ("mla", 8, 2)
    assert (said["mtp_depth"], said["mtp"]) == (1, "sequential")
    assert "balance" not in said
    said = about(trained, "pretrain_32_moe")["config"]
    assert (said["balance"], said["n_routed_experts"], said["shared_width"]) == ("bias", 6, 2)
    state = weights(trained, "pretrain_32_moe")
    assert state["layers.0.feed_forward.shared_experts.w1.weight"].shape == (64, 32)
    assert state["layers.0.feed_forward.gate.expert_bias"].abs().max() > 0
    assert all("violation" in line for line in reports(trained, "pretrain_32_moe"))
    assert all("violation" not in line for line in reports(trained))


@pytest.mark.parametrize("kind", KINDS)
def test_interrupted_and_resumed_is_as_if_never(pretrain, trained, tmp_path, kind):
    name, flags = KINDS[kind]
    pretrain(tmp_path, *STEPS, *flags, "--save_interval", "2", by=call_script, stop_after=2, exit_code=130)
    pretrain(tmp_path, *STEPS, *flags, "--resume", by=call_script)
    assert distance(weights(tmp_path, name), weights(trained, name)) == 0
    assert losses(tmp_path, name) == losses(trained, name)


def test_two_processes_move_the_biases_as_one_does(pretrain, trained, tmp_path):
    pretrain(tmp_path, *STEPS, *BIAS, "--batch_size", "2", processes=2)
    ours, theirs = (weights(out, "pretrain_32_moe") for out in (tmp_path, trained))
    assert distance(ours, theirs) < 2e-3
    biases = [name for name in ours if name.endswith("expert_bias")]
    assert len(biases) == 2 + 2  # those of the blocks, and of the two parallel modules
    assert all(torch.equal(ours[name], theirs[name]) for name in biases)


@pytest.mark.parametrize("kind", KINDS)
def test_the_stages_that_follow_read_it_from_the_json(sft, trained, tmp_path, capsys, kind):
    name, _ = KINDS[kind]
    moe = ("--use_moe",) * name.endswith("_moe")
    sft(tmp_path, "--max_steps", "2", "--from_weight", trained / f"{name}.pth", *moe, by=call_script)
    said, before = (about(out, f)["config"] for out, f in ((tmp_path, f"full_sft_32{name[11:]}"), (trained, name)))
    assert {key: said[key] for key in before if key != "trained_seq_len"} == {
        key: value for key, value in before.items() if key != "trained_seq_len"
    }
    learned, started = weights(tmp_path, f"full_sft_32{name[11:]}"), weights(trained, name)
    assert all(torch.equal(learned[key], started[key]) for key in started if key.startswith("mtp."))
    capsys.readouterr()
    asked = ("--prompt", "你好", "--max_new_tokens", "4", "--out_dir", tmp_path, "--dim", "32", *moe)
    call_script("eval_model.py", *asked, "--tokenizer", sft.common[sft.common.index("--tokenizer") + 1])
    assert "tokens/s" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (("--generation", "3", "--attention", "mla"), "--attention needs --generation 2"),
        (("--balance", "bias"), "--balance needs a mixture of experts: add --use_moe"),
        (("--mtp_depth", "1", "--fsdp"), "mtp_depth 1 cannot be combined with --fsdp"),
        (("--use_moe", "--balance", "bias", "--deepspeed"), "leave --deepspeed out"),
    ],
)
def test_what_does_not_go_together_is_told_in_one_line(pretrain, tmp_path, capsys, flags, told):
    pretrain(tmp_path, *flags, by=call_script, exit_code=2)
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert told in line


@pytest.mark.parametrize("command", [("to-transformers", "new"), ("to-gguf", "new.gguf")])
def test_no_other_tool_is_given_what_it_does_not_know(trained, tmp_path, capsys, sft, command):
    how, new = command
    tokenizer = sft.common[sft.common.index("--tokenizer") + 1]
    call_script(
        *("scripts/convert_model.py", how, trained / "pretrain_32.pth", tmp_path / new, "--tokenizer", tokenizer),
        exit_code=2,
    )
    assert "attention mla, mtp_depth 1" in capsys.readouterr().err
