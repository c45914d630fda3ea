"""Names of weights, and loading them; tests/stages/test_errors.py tests what cannot be loaded, as a user sees it."""

import contextlib
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

from model import LMConfig, MiniMindLM
from model.model_lora import apply_lora, lora_state_dict
from model.tokenizer import special_ids, tokenizer_hash
from tests.families import family
from tests.model.test_weight_layouts import in_april_2025
from tests.running import ROOT
from trainer.errors import UserError
from trainer.files import save_json, save_tensors
from trainer.weights import (
    SCRIPT_OF_STAGE,
    _few,
    architecture,
    find_adapter,
    find_weights,
    infer_sizes,
    load_adapter,
    load_tokenizer,
    load_weights,
    read_settings,
    weights_name,
    weights_path,
)


def test_names():
    assert weights_name("pretrain", 512, False) == "pretrain_512"
    assert weights_name("full_sft", 640, True) == "full_sft_640_moe"
    args = SimpleNamespace(out_dir="out", dim=512, use_moe=False)
    assert str(weights_path(args, "rlhf")) == "out/rlhf_512.pth"


def test_a_downloaded_file_loads_by_the_sizes_of_its_tensors(tiny_out, tiny_tokenizer, tmp_path, capsys):
    path = tmp_path / "downloaded.pth"
    shutil.copy(tiny_out / "full_sft_32.pth", path)
    assert read_settings(path) is None
    model = load_weights(path, None, tiny_tokenizer)
    known = load_weights(tiny_out / "full_sft_32.pth", None, tiny_tokenizer)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(model.parameters(), known.parameters(), strict=True))
    assert model.output.weight is model.tok_embeddings.weight
    assert capsys.readouterr().err.count("has no json beside it") == 1


def test_only_what_is_named_may_lack(tiny_out, tiny_tokenizer, tmp_path):
    path = tmp_path / "part.pth"
    state = torch.load(tiny_out / "full_sft_32.pth", weights_only=True)
    del state["norm.weight"]
    torch.save(state, path)
    with pytest.raises(UserError, match=r"missing: norm\.weight"):
        load_weights(path, None, tiny_tokenizer, missing=("layers.",))
    assert load_weights(path, None, tiny_tokenizer, missing=("norm",)).norm.weight.eq(1).all()


def test_a_folder_without_a_tokenizer(tmp_path):
    with pytest.raises(UserError, match=r"tokenizer\.json"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("folder", ["a\udcff", "a\udcff/tokenizer"])
def test_a_tokenizer_whose_path_is_not_utf8_is_told_so(folder, tokenizer_dir, tmp_path):
    with contextlib.suppress(OSError, UnicodeError):  # where the disk takes such a name
        shutil.copytree(tokenizer_dir, tmp_path / folder)
    with pytest.raises(UserError, match=r"^--tokenizer .*: the path is not UTF-8.*: rename the folder$"):
        load_tokenizer(tmp_path / folder)


def flipped(out, name: str, folder):
    """A copy of weights and their json, with one bit of the weights changed."""
    path = folder / f"{name}.pth"
    for suffix in (".pth", ".json"):
        shutil.copy(out / f"{name}{suffix}", folder)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    return path


def test_a_flipped_bit_is_seen_where_a_json_tells_the_hash(tiny_out, tiny_tokenizer, tmp_path):
    path = flipped(tiny_out, "full_sft_32", tmp_path)
    with pytest.raises(UserError, match=r"full_sft_32\.pth does not match the sha256 in"):
        load_weights(path, None, tiny_tokenizer)
    about = json.loads(path.with_suffix(".json").read_text())
    del about["sha256"]  # as written by an earlier version, or after a user's change
    path.with_suffix(".json").write_text(json.dumps(about))
    load_weights(path, None, tiny_tokenizer)
    path.with_suffix(".json").unlink()
    load_weights(path, None, tiny_tokenizer)


def test_a_flipped_bit_in_an_adapter(tiny_out, tiny_tokenizer, tmp_path):
    model = load_weights(tiny_out / "full_sft_32.pth", None, tiny_tokenizer)
    settings = apply_lora(model, rank=2)
    path = tmp_path / "mine_32.pth"
    about = settings._asdict() | {"sha256": save_tensors(lora_state_dict(model), path)}
    save_json(about, path.with_suffix(".json"))
    model = load_weights(tiny_out / "full_sft_32.pth", None, tiny_tokenizer)
    load_adapter(path, model)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    model = load_weights(tiny_out / "full_sft_32.pth", None, tiny_tokenizer)
    with pytest.raises(UserError, match=r"mine_32\.pth does not match the sha256 in"):
        load_adapter(path, model)


def same_weights(model, state) -> bool:
    return all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_a_file_by_another_tool_is_loaded_and_the_line_says_how(tiny_out, tokenizer_dir, tmp_path, capsys):
    state = torch.load(tiny_out / "full_sft_32.pth", weights_only=True)
    path = tmp_path / "last.ckpt"
    torch.save({"state_dict": {f"model._orig_mod.{name}": value for name, value in state.items()}, "epoch": 1}, path)
    assert same_weights(load_weights(path, None, load_tokenizer(tokenizer_dir)), state)
    assert capsys.readouterr().err.splitlines() == [
        f"{path}: its weights are under 'state_dict'; _orig_mod removed from its names; model. removed from its names",
        f"{path} has no json beside it; assuming the tokenizer {tokenizer_dir}",
    ]


def test_names_of_april_2025_are_read_by_the_heads_and_another_chat_form_is_told(
    tiny_out, tiny_tokenizer, tmp_path, capsys
):
    state = torch.load(tiny_out / "full_sft_32.pth", weights_only=True)
    known = load_weights(tiny_out / "full_sft_32.pth", None, tiny_tokenizer)
    path = tmp_path / "full_sft_32.pth"
    torch.save({name: value.half() for name, value in in_april_2025(state, heads=(8, 2)).items()}, path)
    wanted = {name: value.half().float() for name, value in state.items()}
    for config in (None, known.config):  # MiniMind2's number of heads, or the flags'
        assert same_weights(load_weights(path, config, tiny_tokenizer), wanted)
    assert "began turns with <|im_start|>: give its folder with --tokenizer" in capsys.readouterr().err
    chatml = family("qwen with bos")
    theirs = in_april_2025(make_model_for(chatml).state_dict(), heads=(8, 2))
    torch.save(theirs, path)
    model = load_weights(path, None, chatml)
    assert "im_start" not in capsys.readouterr().err
    assert (model.config.bos_token_id, model.config.eos_token_id, model.config.pad_token_id) == (401, 402, 400)


def make_model_for(tokenizer):
    return MiniMindLM(LMConfig(dim=32, n_layers=1, vocab_size=len(tokenizer)))


def test_a_safetensors_by_the_name_of_the_weights_stands_for_them(tiny_out, tiny_tokenizer, tmp_path):
    state = torch.load(tiny_out / "full_sft_32.pth", weights_only=True)
    save_file({name: value for name, value in state.items() if name != "output.weight"}, tmp_path / "a_32.safetensors")
    shutil.copy(tiny_out / "full_sft_32.json", tmp_path / "a_32.json")
    assert same_weights(load_weights(tmp_path / "a_32.pth", None, tiny_tokenizer), state)
    args = SimpleNamespace(out_dir=str(tmp_path), dim=32, use_moe=False)
    for name in ("a", "a_32", str(tmp_path / "a_32.pth"), str(tmp_path / "a_32.safetensors")):
        assert find_weights(name, args) == tmp_path / "a_32.safetensors"


def test_an_adapter_by_another_tool_is_put_on(tiny_out, tiny_tokenizer, tmp_path):
    model = load_weights(tiny_out / "full_sft_32.pth", None, tiny_tokenizer)
    apply_lora(model, rank=4)
    state = {name: torch.randn_like(value) for name, value in lora_state_dict(model).items()}
    torch.save({"model": {f"module.{name}": value.double() for name, value in state.items()}}, tmp_path / "a.pt")
    fresh = load_weights(tiny_out / "full_sft_32.pth", None, tiny_tokenizer)
    load_adapter(tmp_path / "a.pt", fresh)
    assert all(torch.equal(value, state[name]) for name, value in lora_state_dict(fresh).items())
    with pytest.raises(UserError, match="is a LoRA adapter"):
        load_weights(tmp_path / "a.pt", None, tiny_tokenizer)


def test_a_name_is_looked_for_in_out_dir_before_it_is_a_folder(tmp_path, monkeypatch):
    """A user's own folder `pretrain` in the working directory must not replace the stage."""
    monkeypatch.chdir(tmp_path)
    args = SimpleNamespace(out_dir=str(tmp_path / "out"), dim=512, use_moe=True)
    for folder in ("out", "pretrain", "teacher_768"):
        (tmp_path / folder).mkdir()
    with pytest.raises(UserError, match=r"pretrain_512_moe\.pth is missing: run train_pretrain\.py$"):
        find_weights("pretrain", args)
    for folder in ("pretrain", "teacher_768"):
        (tmp_path / folder / "config.json").write_text("{}")
        assert find_weights(folder, args) == Path(folder)
    for file, name in (("pretrain_512_moe", "pretrain"), ("teacher_768", "teacher_768")):
        (tmp_path / "out" / f"{file}.pth").touch()
        assert find_weights(name, args) == tmp_path / "out" / f"{file}.pth"
    assert find_weights("./pretrain", args) == Path("pretrain")
    assert find_weights("out/teacher_768.pth", args) == Path("out/teacher_768.pth")


def test_what_is_missing_says_what_is_there(tiny_tokenizer, tmp_path):
    for name in ("full_sft_256.pth", "full_sft_640_moe.pth", "pretrain_512.pth", "full_sft_64.json", "lora/me_256.pth"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    there = f"{tmp_path / 'full_sft_256.pth'} (--dim 256), {tmp_path / 'full_sft_640_moe.pth'} (--dim 640 --use_moe)"
    by_flags = SimpleNamespace(out_dir=str(tmp_path), dim=512, use_moe=False)
    without_flags = there.replace(" (--dim 256)", "").replace(" (--dim 640 --use_moe)", "")

    def told(find, *arguments) -> str:
        with pytest.raises(UserError) as error:
            find(*arguments)
        return str(error.value)

    for dim, use_moe, name in ((512, False, "full_sft_512.pth"), (256, True, "full_sft_256_moe.pth")):
        args = SimpleNamespace(out_dir=str(tmp_path), dim=dim, use_moe=use_moe)
        error = f"{tmp_path / name} is missing: run train_full_sft.py; there is "
        assert told(find_weights, "full_sft", args) == error + there
        assert told(find_weights, str(tmp_path / name), args) == error + without_flags
        assert told(load_weights, tmp_path / name, None, tiny_tokenizer) == error + without_flags
    error = f"{tmp_path / 'full_sft_768.pth'} is missing: run train_full_sft.py; there is {without_flags}"
    assert told(find_weights, "full_sft_768", by_flags) == error
    adapter = f"there is {tmp_path / 'lora' / 'me_256.pth'}"
    assert told(find_adapter, "me", by_flags).endswith(f"--lora_name NAME; {adapter} (--dim 256)")
    assert told(find_adapter, str(tmp_path / "lora" / "me_512.pth"), by_flags).endswith(adapter)
    assert told(find_weights, "rlhf", by_flags) == f"{tmp_path / 'rlhf_512.pth'} is missing: run train_dpo.py"
    (tmp_path / "folder").mkdir()
    assert "config.json is missing" in told(find_weights, str(tmp_path / "folder"), by_flags)


def test_another_depth_says_which_flag(tiny_out, tiny_tokenizer):
    path = tiny_out / "full_sft_32.pth"
    config = load_weights(path, None, tiny_tokenizer).config
    config.n_layers = 8
    with pytest.raises(UserError, match=r"but the flags ask for n_layers 8: give --n_layers 2$"):
        load_weights(path, config, tiny_tokenizer)
    config.n_layers = 2
    config.rope_theta = 1e4
    with pytest.raises(UserError, match=r"but the flags ask for rope_theta 10000\.0$"):
        load_weights(path, config, tiny_tokenizer)


def test_a_json_beside_the_weights_gives_the_rope_to_the_model(tiny_out, tiny_tokenizer, tmp_path):
    shutil.copy(tiny_out / "full_sft_32.pth", tmp_path)
    settings = json.loads((tiny_out / "full_sft_32.json").read_text())
    settings["config"] |= {"rope_theta": 1e4, "norm_eps": 1e-6}
    (tmp_path / "full_sft_32.json").write_text(json.dumps(settings))
    config = load_weights(tmp_path / "full_sft_32.pth", None, tiny_tokenizer).config
    assert (config.rope_theta, config.norm_eps) == (1e4, 1e-6)


def test_a_json_that_tells_no_special_ids_gets_the_tokenizers(tiny_out, tiny_tokenizer, tmp_path):
    family("qwen with bos").save_pretrained(tmp_path / "tokenizer")
    tokenizer = load_tokenizer(tmp_path / "tokenizer")
    model = MiniMindLM(LMConfig(dim=16, n_layers=1, n_heads=2, vocab_size=len(tokenizer)))
    torch.save(model.state_dict(), tmp_path / "full_sft_16.pth")
    about = {"config": architecture(model.config), "tokenizer": tokenizer_hash(tokenizer)}
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        about["config"].pop(name, None)
    save_json(about, tmp_path / "full_sft_16.json")
    assert (
        special_ids(tokenizer).items()
        <= vars(load_weights(tmp_path / "full_sft_16.pth", None, tokenizer).config).items()
    )


def test_a_tokenizer_without_pad_token_pads_with_one_it_has(tmp_path):
    for name, pad in (("llama3", "<|end_of_text|>"), ("gpt2", "<|endoftext|>"), ("qwen with bos", "<|endoftext|>")):
        family(name).save_pretrained(tmp_path / name)
        tokenizer = load_tokenizer(tmp_path / name)
        assert (tokenizer.pad_token, len(tokenizer)) == (pad, len(family(name)))


@pytest.mark.parametrize("shared", [True, False])
def test_the_tensors_tell_whether_there_are_shared_experts(shared):
    config = LMConfig(dim=32, n_layers=2, vocab_size=64, use_moe=True, n_routed_experts=3, n_shared_experts=shared)
    sizes = infer_sizes(MiniMindLM(config).state_dict())
    assert (sizes["use_moe"], sizes["n_routed_experts"], sizes["n_shared_experts"]) == (True, 3, shared)


def test_every_stage_is_made_by_the_script_that_is_named():
    assert SCRIPT_OF_STAGE == {
        **{"pretrain": "train_pretrain.py", "full_sft": "train_full_sft.py", "rlhf": "train_dpo.py"},
        **{"full_dist": "train_distillation.py", "reason": "train_distill_reason.py"},
        **{"grpo": "train_grpo.py", "ppo": "train_ppo.py", "reward": "train_reward.py"},
        **{"pretrain_vlm": "train_pretrain_vlm.py", "sft_vlm": "train_sft_vlm.py"},
        "sft_vlm_multi": "train_sft_vlm.py --multi",
    }
    for stage, script in SCRIPT_OF_STAGE.items():
        assert f'"{stage}"' in (ROOT / script.split()[0]).read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("keys", "told"),
    [("", "none"), ("a", "a"), ("abc", "a, b, c"), ("abcd", "a, b, c and 1 more"), ("abcdef", "a, b, c and 3 more")],
)
def test_a_long_list_of_names_is_cut(keys, told):
    assert _few(list(keys)) == told


@pytest.mark.parametrize(("name", "ours"), [("bos_token_id", 1), ("eos_token_id", 2), ("pad_token_id", None)])
def test_what_begins_and_ends_a_turn_is_as_it_was_in_training(name, ours, tiny_out, tiny_tokenizer, tmp_path):
    """The padding token may differ, because padding is known by position."""
    path = tmp_path / "full_sft_32.pth"
    shutil.copy(tiny_out / path.name, path)
    settings = json.loads((tiny_out / "full_sft_32.json").read_text())
    settings["config"][name] = 5
    path.with_suffix(".json").write_text(json.dumps(settings))
    if ours is None:
        config = load_weights(path, None, tiny_tokenizer).config
        assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (1, 2, 0)
    else:
        with pytest.raises(UserError, match=f"was trained with {name} 5, but .* has {ours}: correct its settings"):
            load_weights(path, None, tiny_tokenizer)


@pytest.mark.parametrize(
    "change",
    [{"tokenizer": 3}, {"tokenizer": None}, {"config": None}, {"config": {"dim": 0}}, {"config": {"dim": "x"}}],
)
def test_a_json_of_other_things_is_damaged(change, tmp_path):
    (tmp_path / "a.json").write_text(json.dumps({"tokenizer": "t", "config": {"dim": 32}} | change))
    with pytest.raises(UserError, match=r"a\.json is damaged .*: restore it, or delete it to use the flags"):
        read_settings(tmp_path / "a.pth")


@pytest.mark.parametrize(("alpha", "fits"), [(0.001, True), (0, False), (-1, False), (None, True)])
def test_the_alpha_of_an_adapter_is_above_0(alpha, fits, tiny_out, tiny_tokenizer, tmp_path):
    model = load_weights(tiny_out / "full_sft_32.pth", None, tiny_tokenizer)
    apply_lora(model, rank=2)
    save_tensors(lora_state_dict(model), tmp_path / "a.pth")
    (tmp_path / "a.json").write_text(json.dumps({} if alpha is None else {"alpha": alpha}))
    model = load_weights(tiny_out / "full_sft_32.pth", None, tiny_tokenizer)
    if fits:
        load_adapter(tmp_path / "a.pth", model)
    else:
        with pytest.raises(UserError, match=r"a\.json is damaged .*alpha is not above 0"):
            load_adapter(tmp_path / "a.pth", model)


@pytest.mark.parametrize(
    ("asked", "hint"),
    [
        ({"dim": 64}, ": give --dim 32"),
        ({"dim": 64, "n_layers": 3}, ": give --dim 32 --n_layers 2"),
        ({"use_moe": True}, ": give --no-use_moe"),
        ({"n_heads": 16}, ""),
    ],
)
def test_the_flags_to_give_are_told(asked, hint, tiny_out, tiny_tokenizer):
    with pytest.raises(UserError) as error:
        load_weights(tiny_out / "full_sft_32.pth", asked, tiny_tokenizer)
    assert "according to its json, but the flags ask for " in str(error.value)
    assert "".join(str(error.value).partition(": give ")[1:]) == hint


def test_what_the_tensors_of_nothing_tell():
    assert infer_sizes({}) == {"n_layers": 0, "use_moe": False}
    sizes = infer_sizes(
        {"tok_embeddings.weight": torch.ones(7, 5), "layers.0.feed_forward.w1.weight": torch.ones(9, 5)}
    )
    assert sizes == {"n_layers": 1, "use_moe": False, "vocab_size": 7, "dim": 5, "hidden_dim": 9}


def test_the_fields_of_experts_are_told_of_a_mixture_alone():
    of_experts = {"num_experts_per_tok", "n_routed_experts", "n_shared_experts", "norm_topk_prob"}
    dense, moe = (set(architecture(LMConfig(dim=32, n_layers=1, vocab_size=9, use_moe=moe))) for moe in (False, True))
    assert moe - dense == of_experts
    assert dense == {
        *("dim", "n_layers", "n_heads", "n_kv_heads", "vocab_size", "hidden_dim", "norm_eps", "rope_theta", "use_moe"),
        *("bos_token_id", "eos_token_id", "generation"),
    }
