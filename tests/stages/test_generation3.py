"""Every training stage of text trains a MiniMind-3: from nothing, from weights, of experts, and refuses the other."""

import pytest
import torch

from model import MiniMind3Config, MiniMind3LM
from tests.stages.every_script import SCRIPTS, Script, World, make_world
from tests.stages.training import about, weights

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
    elif script.name != "pretrain":  # from nothing
        start = torch.load(next(world.folder.glob(f"full_sft_32{'_moe' * use_moe}.pth")), weights_only=True)
        assert start.keys() == state.keys()
        assert any(not torch.equal(start[key], state[key]) for key in state)
    assert all(torch.isfinite(value).all() for value in state.values())
    assert run is not None
