"""trainer/teacher.py: which teachers are accepted, which are refused and why, and their logits on packed rows."""

import copy
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from dataset import collate
from model import LMConfig, MiniMindLM
from tests.model.test_weight_layouts import in_april_2025
from trainer.errors import UserError
from trainer.teacher import first_difference, load_teacher, teacher_logits


def changed(tokenizer: PreTrainedTokenizerFast, change) -> PreTrainedTokenizerFast:
    """A copy of a tokenizer whose json `change` has modified."""
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    change(state)
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(state)), bos_token="<s>", eos_token="</s>", pad_token="<unk>"
    )


def llama(vocab_size: int) -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(vocab_size=vocab_size, max_position_embeddings=64, **sizes)).eval()


def gpt2(vocab_size: int) -> GPT2LMHeadModel:
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=vocab_size, n_positions=64, n_embd=32, n_layer=2, n_head=4)).eval()


def minimind(vocab_size: int) -> MiniMindLM:
    torch.manual_seed(0)
    return MiniMindLM(LMConfig(dim=32, n_layers=2, vocab_size=vocab_size)).eval()


@pytest.mark.parametrize("make", [llama, gpt2, minimind])
def test_samples_packed_in_a_row_get_what_they_get_alone(make):
    teacher = make(vocab_size=70)
    samples = [torch.randint(0, 64, (length,)) for length in (5, 9, 3)]
    packed = {
        "input_ids": torch.cat(samples[:2]),
        "labels": torch.cat(samples[:2]),
        "position_ids": torch.cat([torch.arange(len(sample)) for sample in samples[:2]]),
    }
    short = {"input_ids": samples[2], "labels": samples[2], "position_ids": torch.arange(3)}
    batch = collate([packed, short], 16)
    del batch["labels"]
    logits = teacher_logits(teacher, batch, batch["attention_mask"], 64)
    with torch.no_grad():
        alone = [teacher(input_ids=sample[None]).logits[0, :, :64] for sample in samples]
    torch.testing.assert_close(logits, torch.cat(alone), rtol=0, atol=1e-5)
    kept = torch.zeros(2, 16, dtype=torch.bool)
    kept[0, [4, 9]] = kept[1, 1] = True
    some = torch.stack([alone[0][4], alone[1][4], alone[2][1]])
    torch.testing.assert_close(teacher_logits(teacher, batch, kept, 64), some, rtol=0, atol=1e-5)


def test_a_transformers_folder_with_more_columns_is_taken(tiny_tokenizer, tmp_path):
    llama(len(tiny_tokenizer) + 24).save_pretrained(tmp_path)
    tiny_tokenizer.save_pretrained(tmp_path)
    teacher = load_teacher(tmp_path, tiny_tokenizer, 64)
    assert isinstance(teacher, LlamaForCausalLM)
    assert not teacher.training
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    assert all(parameter.dtype == torch.float32 for parameter in teacher.parameters())


def test_a_pth_gives_its_own_sizes(tiny_tokenizer, tiny_out, tmp_path, capsys):
    model = MiniMindLM(LMConfig(dim=64, n_layers=3, vocab_size=len(tiny_tokenizer)))
    torch.save(model.state_dict(), tmp_path / "downloaded.pth")
    by_tensors = load_teacher(tmp_path / "downloaded.pth", tiny_tokenizer, 64)
    assert (by_tensors.config.dim, by_tensors.config.n_layers) == (64, 3)
    assert "no json beside it" in capsys.readouterr().err
    by_json = load_teacher(tiny_out / "full_sft_32.pth", tiny_tokenizer, 64)
    assert by_json.config.dim == 32
    assert capsys.readouterr().err == ""


def test_a_teacher_that_reads_less_than_a_row_is_refused(tiny_tokenizer, tmp_path):
    llama(len(tiny_tokenizer)).save_pretrained(tmp_path)
    tiny_tokenizer.save_pretrained(tmp_path)
    longest = LlamaForCausalLM.from_pretrained(tmp_path).config.max_position_embeddings
    load_teacher(tmp_path, tiny_tokenizer, longest)
    with pytest.raises(UserError, match=f"has a context of {longest} tokens: lower --max_seq_len {longest + 1}"):
        load_teacher(tmp_path, tiny_tokenizer, longest + 1)


def refusal(path: Path, tokenizer) -> str:
    with pytest.raises(UserError) as error:
        load_teacher(path, tokenizer, 64)
    return str(error.value)


def test_what_is_refused_and_why(tiny_tokenizer, plain_tokenizer, tmp_path):
    assert "nowhere/full_sft_99.pth is missing" in refusal(Path("nowhere/full_sft_99.pth"), tiny_tokenizer)
    folder = tmp_path / "teacher"
    folder.mkdir()
    assert "no tokenizer.json" in refusal(folder, tiny_tokenizer)
    tiny_tokenizer.save_pretrained(folder)
    assert "config.json is missing" in refusal(folder, tiny_tokenizer)
    llama(len(tiny_tokenizer) - 1).save_pretrained(folder)
    plain_tokenizer.save_pretrained(folder)
    assert "id 3 is '<think>' for the student and '!' for the teacher" in refusal(folder, tiny_tokenizer)
    tiny_tokenizer.save_pretrained(folder)
    assert f"has {len(tiny_tokenizer) - 1} embeddings" in refusal(folder, tiny_tokenizer)
    (folder / "model.safetensors").write_bytes(b"nothing")
    assert "cannot be loaded" in refusal(folder, tiny_tokenizer)
    (folder / "model.safetensors").unlink()
    assert "cannot be loaded" in refusal(folder, tiny_tokenizer)


def test_a_folder_that_lacks_a_parameter_is_not_filled_with_random_numbers(tiny_tokenizer, tmp_path):
    """Such as a MiniMind folder of April 2025, whose tensor names transformers does not know for its model type."""
    model = minimind(len(tiny_tokenizer))
    model.save_pretrained(tmp_path)
    tiny_tokenizer.save_pretrained(tmp_path)
    taken = load_teacher(tmp_path, tiny_tokenizer, 64).state_dict()
    assert all(torch.equal(value, taken[name]) for name, value in model.state_dict().items())
    for state in (
        {name: value for name, value in model.state_dict().items() if name not in ("norm.weight", "output.weight")},
        {name: value.clone() for name, value in in_april_2025(model.state_dict(), heads=(8, 2)).items()},
    ):
        save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
        assert "that its config.json describes" in refusal(tmp_path, tiny_tokenizer)


def test_the_first_difference_between_tokenizers(tiny_tokenizer):
    def swap_merges(state):
        merges = state["model"]["merges"]
        merges[4], merges[5] = merges[5], merges[4]

    def add_a_token(state):
        last = copy.deepcopy(state["added_tokens"][-1])
        state["added_tokens"].append(last | {"id": len(tiny_tokenizer), "content": "<more>"})

    assert first_difference(tiny_tokenizer, changed(tiny_tokenizer, lambda state: None)) is None
    assert first_difference(tiny_tokenizer, changed(tiny_tokenizer, swap_merges)).startswith("merge 4 joins ")
    more = f"id {len(tiny_tokenizer)} is None for the student and '<more>' for the teacher"
    assert first_difference(tiny_tokenizer, changed(tiny_tokenizer, add_a_token)) == more
    spaced = changed(tiny_tokenizer, lambda state: state["pre_tokenizer"].update(add_prefix_space=True))
    assert first_difference(tiny_tokenizer, spaced) == "their pre tokenizer differ"
