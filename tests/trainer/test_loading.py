"""trainer/loading.py: a model for inference, from a file or a folder; transformers' logits are the oracle."""

import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM

from model import LMConfig
from model.images import prepare_chat
from model.model_lora import apply_lora, lora_layers, lora_state_dict, merge_lora
from model.model_vlm import MiniMindVLM
from scripts.formats.transformers_folder import write_folder
from tests.conftest import SPECIAL, train_tokenizer
from tests.scripts.conversion import make_model, save_model
from tests.scripts.vlm_weights import picture, save_vlm
from trainer.errors import UserError
from trainer.loading import load_by_flags, load_for_inference, load_vlm_for_inference
from trainer.weights import load_weights


@pytest.fixture(scope="module")
def small_tokenizer_dir(tmp_path_factory):
    """A tokenizer of 320 entries, like the reference checkpoints' vocabulary."""
    folder = tmp_path_factory.mktemp("tokenizer_320")
    train_tokenizer(SPECIAL, vocab_size=320).save_pretrained(folder)
    return folder


def logits(model, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(ids).logits


@pytest.mark.parametrize("use_moe", [False, True])
@pytest.mark.parametrize("layout", ["transformers", "minimind"])
def test_a_folder_computes_what_transformers_computes_from_it(tiny_tokenizer, tmp_path, layout, use_moe):
    model = make_model(len(tiny_tokenizer), use_moe=use_moe)
    if layout == "minimind":
        model.half().save_pretrained(tmp_path)
        tiny_tokenizer.save_pretrained(tmp_path)
    else:
        write_folder(model, tiny_tokenizer, tmp_path)
    ours, tokenizer = load_for_inference(str(tmp_path))
    ids = torch.randint(len(tiny_tokenizer), (2, 50), generator=torch.Generator().manual_seed(0))
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    torch.testing.assert_close(logits(ours, ids), logits(theirs, ids), rtol=0, atol=1e-4)
    assert {parameter.dtype for parameter in ours.parameters()} == {torch.float32}
    assert (ours.training, ours.device.type) == (False, "cpu")
    assert tokenizer.get_vocab() == tiny_tokenizer.get_vocab()


@pytest.mark.parametrize("name", ["minimind2_dense_lora", "minimind2_moe"])
def test_a_published_file_computes_its_reference_logits(shared, small_tokenizer_dir, name):
    """It has no json: the caller gives the number of heads, its tensors give the rest."""
    path = shared / f"fixtures/{name}.pth"
    expected = torch.load(path.with_suffix(".expected.pt"), weights_only=True)
    config = LMConfig(**expected["config"])
    heads = {size: getattr(config, size) for size in ("n_heads", "n_kv_heads", "num_experts_per_tok", "max_seq_len")}
    model, _ = load_for_inference(path, small_tokenizer_dir, **heads)
    torch.testing.assert_close(logits(model, expected["input_ids"]), expected["logits"], rtol=0, atol=1e-4)
    if name == "minimind2_dense_lora":
        adapter = path.with_suffix(".adapter.pth")
        merged, _ = load_for_inference(path, small_tokenizer_dir, adapter, **heads)
        torch.testing.assert_close(logits(merged, expected["input_ids"]), expected["lora_logits"], rtol=0, atol=1e-4)
        assert not lora_layers(merged)
        assert merged.state_dict().keys() == model.state_dict().keys()


def test_the_json_tells_the_sizes_and_what_the_caller_says_is_compared(tiny_tokenizer, tokenizer_dir, tmp_path):
    path = save_model(make_model(len(tiny_tokenizer)), tiny_tokenizer, tmp_path / "full_sft_64.pth")
    model, _ = load_for_inference(path, tokenizer_dir)
    assert (model.config.n_heads, model.config.max_seq_len) == (4, 256)
    model, _ = load_for_inference(path, tokenizer_dir, dim=64, n_layers=2, n_heads=4, max_seq_len=99)
    assert model.config.max_seq_len == 99
    with pytest.raises(UserError, match="2 according to its json, but the flags ask for n_layers 3: give --n_layers 2"):
        load_for_inference(path, tokenizer_dir, n_layers=3)
    with pytest.raises(TypeError, match="LMConfig has no layers"):
        load_for_inference(path, tokenizer_dir, layers=2)
    path.with_suffix(".json").unlink()
    with pytest.raises(UserError, match="has n_layers 2 according to its tensors, but the flags ask for n_layers 3"):
        load_for_inference(path, tokenizer_dir, n_layers=3)
    assert load_for_inference(path, tokenizer_dir, n_heads=4)[0].config.n_heads == 4
    with pytest.raises(UserError, match=r"vocab_size 589 according to its tensors.* 6400"):
        load_for_inference(path)  # the shipped tokenizer is a different one
    with pytest.raises(UserError, match=r"nothing_64\.pth is missing"):
        load_for_inference(tmp_path / "nothing_64.pth", tokenizer_dir)


def test_a_folder_is_held_to_its_config_and_its_tokenizer(tiny_tokenizer, plain_tokenizer, tmp_path, capsys):
    folder = tmp_path / "llama"
    write_folder(make_model(len(tiny_tokenizer)), tiny_tokenizer, folder)
    plain_tokenizer.save_pretrained(tmp_path / "other")
    with pytest.raises(UserError, match=r"llama has its own tokenizer.*give the right folder with --tokenizer"):
        load_for_inference(folder, tmp_path / "other")
    with pytest.raises(
        UserError, match=r"has n_heads 4 according to its config\.json, but the flags ask for n_heads 8"
    ):
        load_for_inference(folder, n_heads=8)
    (folder / "tokenizer.json").rename(tmp_path / "tokenizer.json")
    with pytest.raises(UserError, match=r"no tokenizer\.json there"):
        load_for_inference(folder)
    capsys.readouterr()
    load_for_inference(folder, tmp_path / "other")
    assert capsys.readouterr().err == (f"{folder} has no tokenizer.json; assuming the tokenizer {tmp_path / 'other'}\n")
    with pytest.raises(UserError, match=r"has 589 embeddings, but .* has 6400"):
        load_for_inference(folder, "model/minimind_tokenizer")


def test_an_adapter_is_in_the_weights(tiny_out, tokenizer_dir, tiny_tokenizer, tmp_path):
    base = tiny_out / "full_sft_32.pth"
    model = load_weights(base, None, tiny_tokenizer)
    apply_lora(model, rank=2)
    for layer in lora_layers(model).values():
        torch.nn.init.normal_(layer.lora.B.weight)
    torch.save(lora_state_dict(model), tmp_path / "me_32.pth")
    merge_lora(model)
    args = SimpleNamespace(out_dir=str(tmp_path), dim=32, use_moe=False, n_layers=2, tokenizer=str(tokenizer_dir))
    (tmp_path / "lora").mkdir()
    shutil.copy(tmp_path / "me_32.pth", tmp_path / "lora")
    for suffix in (".pth", ".json"):
        shutil.copy(base.with_suffix(suffix), tmp_path)
    args.load, args.model_mode, args.lora_name = 0, 1, "me"
    for merged, _ in (load_for_inference(base, tokenizer_dir, tmp_path / "me_32.pth"), load_by_flags(args)):
        assert not lora_layers(merged)
        state = merged.state_dict()
        assert state.keys() == model.state_dict().keys()
        assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    with pytest.raises(UserError, match="is a LoRA adapter"):
        load_for_inference(tmp_path / "me_32.pth", tokenizer_dir)


def test_a_vision_model_from_a_file_and_from_a_folder(tiny_tokenizer, tokenizer_dir, clip_dir, tmp_path):
    path = save_vlm(tiny_tokenizer, clip_dir, tmp_path / "sft_vlm_32.pth")
    model, tokenizer, processor = load_vlm_for_inference(path, clip_dir, tokenizer_dir)
    model.save_pretrained(tmp_path / "folder")
    tiny_tokenizer.save_pretrained(tmp_path / "folder")
    again, _, _ = load_vlm_for_inference(tmp_path / "folder", clip_dir)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "folder", dtype=torch.float32).eval()
    theirs.set_tower(model.vision_encoder)
    assert isinstance(again, MiniMindVLM)
    assert again.config.image_token_id == model.config.image_token_id
    chat = [{"role": "user", "content": [picture("red"), "What colour?"]}]
    prompt = prepare_chat(tokenizer, chat, model.config, processor)
    with torch.no_grad():
        seen = [each(prompt.input_ids, **prompt.images).logits for each in (model, again, theirs)]
    assert torch.equal(seen[0], seen[1])
    torch.testing.assert_close(seen[1], seen[2], rtol=0, atol=1e-5)
    for wrong in (path, tmp_path / "folder"):
        with pytest.raises(UserError, match=r"unexpected: vision_proj.* \(it is a vision-language model\)"):
            load_for_inference(wrong, tokenizer_dir)
    config = tmp_path / "folder" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"image_tokens": 9}))
    with pytest.raises(UserError, match="has image_tokens 9, but --vision_model gives 4"):
        load_vlm_for_inference(tmp_path / "folder", clip_dir)
