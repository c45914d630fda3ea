"""Every text stage trains a MiniMind-3: from scratch, from weights, with experts; generation 2's are refused."""

import pytest
import torch

from model import MiniMind3Config, MiniMind3LM
from model.inference.scheduler import Engine
from tests.running import call_script
from tests.stages.every_script import SCRIPTS, Script, World, make_world
from tests.stages.training import about, weights
from trainer.weights import load_tokenizer

TEXT = [script for script in SCRIPTS if "vlm" not in script.path]
THIRD = ("--generation", "3", "--max_steps", "2")


@pytest.fixture(scope="module")
def world(tiny_tokenizer, clip_dir, tmp_path_factory) -> World:
    world = make_world(tmp_path_factory.mktemp("world"), tiny_tokenizer, clip_dir)
    torch.manual_seed(0)
    for use_moe in (False, True):
        config = MiniMind3Config(dim=32, n_layers=2, vocab_size=len(tiny_tokenizer), use_moe=use_moe)
        state = MiniMind3LM(config).state_dict()
        for name in ("pretrain", "full_sft", "rlhf"):
            torch.save(state, world.folder / f"{name}_32{'_moe' * use_moe}.pth")
    return world


@pytest.mark.parametrize("script", TEXT, ids=lambda script: script.path.removesuffix(".py"))
@pytest.mark.parametrize("use_moe", [False, True], ids=["dense", "moe"])
def test_every_stage_trains_a_minimind3(world, script: Script, use_moe, tmp_path):
    run = world.call(script, tmp_path, *THIRD, use_moe=use_moe)
    name = script.name + "_32" + "_moe" * use_moe
    state, said = weights(tmp_path, name), about(tmp_path, name)
    assert (said["config"]["generation"], said["step"]) == (3, 2)
    assert said["config"]["trained_seq_len"] == 128
    assert all(key.startswith(("model.", "lm_head.")) for key in state)
    if script.name.startswith("lora/"):
        assert {key.split(".lora.")[0].rpartition(".")[2] for key in state} == {"q_proj", "o_proj"}
    elif script.name != "pretrain":  # from scratch
        start = torch.load(next(world.folder.glob(f"full_sft_32{'_moe' * use_moe}.pth")), weights_only=True)
        assert start.keys() == state.keys()
        assert any(not torch.equal(start[key], state[key]) for key in state)
    assert all(torch.isfinite(value).all() for value in state.values())
    assert run is not None


def eval_model(capsys, *flags) -> str:
    capsys.readouterr()
    call_script("eval_model.py", "--prompt", "你好", "--max_new_tokens", "4", "--temperature", "0", *flags)
    return capsys.readouterr().out


def test_it_is_talked_to_by_its_own_tokenizer_and_template(shared, tmp_path, capsys, monkeypatch):
    folder = shared / "fixtures" / "minimind3_tokenizer"
    if not folder.is_dir():
        pytest.skip("no tokenizer of MiniMind-3")
    torch.manual_seed(0)
    model = MiniMind3LM(MiniMind3Config(dim=32, n_layers=2, n_heads=4, n_kv_heads=2, vocab_size=6400)).eval()
    torch.save(model.state_dict(), tmp_path / "full_sft_32.pth")
    named = ("--out_dir", tmp_path, "--dim", "32", "--n_layers", "2", "--tokenizer", folder)
    asked = []

    def stream(self, request, right=Engine.stream):
        asked.append(list(request.prompt))
        return right(self, request)

    monkeypatch.setattr(Engine, "stream", stream)
    eval_model(capsys, *named)
    eval_model(capsys, *named, "--open_thinking")
    tokenizer = load_tokenizer(folder)
    for ids, opened in zip(asked, (False, True), strict=True):
        turns = [{"role": "user", "content": "你好"}]
        assert ids == tokenizer.apply_chat_template(
            turns, add_generation_prompt=True, open_thinking=opened, return_dict=False
        )


def refused(world, capsys, script: Script, out, *flags) -> str:
    """The line of error with which a stage refuses to start."""
    capsys.readouterr()
    world.call(script, out, *flags, exit_code=2)
    return capsys.readouterr().err.splitlines()[-1]


def test_a_mismatch_of_generations_is_refused_by_name(world, tmp_path, capsys):
    pretrain, sft = TEXT[0], TEXT[1]
    said = refused(world, capsys, sft, tmp_path / "a")
    assert said.endswith("has generation 3 according to its tensors, but the flags ask for generation 2: "
                         "give --generation 3")  # fmt: skip
    world.call(pretrain, tmp_path / "b", *THIRD)
    again = (*THIRD[:2], "--resume", "--max_steps", "4")
    assert "generation 3" in refused(world, capsys, pretrain, tmp_path / "b", *again[2:])
    world.call(pretrain, tmp_path / "b", *again)
    assert about(tmp_path / "b", "pretrain_32")["step"] == 4


def test_positions_are_stretched_by_a_flag_and_never_dropped_in_silence(world, tmp_path, capsys):
    pretrain, sft = TEXT[0], TEXT[1]
    yarn = ("--generation", "3", "--max_steps", "1", "--rope_scaling", "yarn:4:32")
    world.call(pretrain, tmp_path, *yarn)
    said = about(tmp_path, "pretrain_32")["config"]
    assert said["rope_scaling"]["original_max_position_embeddings"] == 32
    assert (said["rope_scaling"]["factor"], said["trained_seq_len"], said["max_seq_len"]) == (4.0, 128, 32768)
    start = ("--from_weight", tmp_path / "pretrain_32.pth")
    plain = refused(world, capsys, sft, tmp_path / "sft", *start, *yarn[:4])
    assert "has rope_scaling yarn according to its json" in plain
    assert plain.endswith("give --rope_scaling yarn:4:32")
    world.call(sft, tmp_path / "sft", *start, *yarn)
    wrong = refused(world, capsys, sft, tmp_path / "sft", *start, "--rope_scaling", "dynamic:4")
    assert "must be yarn, ntk or linear, a factor" in wrong
    both = ("--rope_scaling", "ntk:4", "--inference_rope_scaling")
    assert "choose one" in refused(world, capsys, sft, tmp_path / "sft", *start, *both)
