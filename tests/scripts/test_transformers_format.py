"""MiniMind as a Llama or Qwen2-MoE folder; the oracle is transformers' output for the folder."""

import json
import math

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, pipeline

from model import LMConfig, MiniMindLM
from model.chat import render_chat
from model.chat_template import CHAT_TEMPLATE
from scripts.formats.transformers_folder import check_equal, to_their_config, write_folder
from tests.conftest import SENTENCES
from tests.scripts.conversion import QUESTIONS, copy_folder, greedy, make_model, prompts
from trainer.errors import UserError
from trainer.folder_layouts import to_our_config, to_our_state
from trainer.loading import load_for_inference

SHAPES = {
    "dense": {},
    "dense, as many key heads as query heads": {"n_kv_heads": 4, "rope_theta": 1e4, "norm_eps": 1e-6},
    "moe": {"use_moe": True},
    "moe, one expert a token": {"use_moe": True, "num_experts_per_tok": 1, "n_routed_experts": 3},
    "moe, not normalised": {"use_moe": True, "norm_topk_prob": False},
    "moe, nothing shared": {"use_moe": True, "n_shared_experts": False},
}


@pytest.fixture(scope="module", params=SHAPES)
def written(request, tiny_tokenizer, tmp_path_factory):
    """A model, and the folder that it was written to."""
    model = make_model(len(tiny_tokenizer), **SHAPES[request.param])
    folder = tmp_path_factory.mktemp("folder") / "llama"
    write_folder(model, tiny_tokenizer, folder)
    return model, folder


@pytest.fixture(scope="module")
def llama(tiny_tokenizer, tmp_path_factory):
    """A dense model and its folder."""
    model = make_model(len(tiny_tokenizer))
    folder = tmp_path_factory.mktemp("folder") / "llama"
    write_folder(model, tiny_tokenizer, folder)
    return model, folder


def test_transformers_computes_the_same_logits_and_writes_the_same_text(written, tiny_tokenizer):
    model, folder = written
    theirs = AutoModelForCausalLM.from_pretrained(folder).eval()  # without trust_remote_code
    assert type(theirs).__name__ == ("Qwen2MoeForCausalLM" if model.config.use_moe else "LlamaForCausalLM")
    ids = torch.randint(model.config.vocab_size, (2, 100), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert (model(ids).logits - theirs(ids).logits).abs().max() < 1e-4
    for prompt in prompts(tiny_tokenizer):
        answer = theirs.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=24)[0, len(prompt) :]
        assert answer.tolist() == greedy(model, prompt)


def test_weights_and_sizes_come_back_bit_for_bit(written, tiny_tokenizer):
    model, folder = written
    back, tokenizer = load_for_inference(folder)
    state = back.state_dict()
    assert state.keys() == model.state_dict().keys()
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert tokenizer.get_vocab() == tiny_tokenizer.get_vocab()
    config, ours = back.config.to_dict(), model.config.to_dict()
    assert {k: v for k, v in config.items() if ours[k] != v} == {}


def test_the_folder_is_plain_and_readable_by_older_transformers(llama):
    _, folder = llama
    assert sorted(file.name for file in folder.iterdir()) == [
        *("config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"),
    ]
    config = json.loads((folder / "config.json").read_text())
    assert config["rope_theta"] == 1e6  # otherwise transformers 4 would take 1e4
    about = json.loads((folder / "tokenizer_config.json").read_text())
    assert about["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert about["chat_template"] == CHAT_TEMPLATE
    assert about["padding_side"] == "left"
    assert about["model_max_length"] == 256
    writing = GenerationConfig.from_pretrained(folder)
    assert (writing.pad_token_id, writing.bos_token_id, writing.eos_token_id) == (0, 1, 2)
    assert (writing.do_sample, writing.temperature, writing.top_p) == (True, 0.85, 0.85)  # as in eval_model.py


def test_the_pipeline_chats(llama, tiny_tokenizer):
    model, folder = llama
    chat = [{"role": "user", "content": QUESTIONS[0]}]
    out = pipeline("text-generation", model=str(folder), device="cpu")(chat, do_sample=False, max_new_tokens=24)
    answer = out[0]["generated_text"][-1]
    ids = greedy(model, prompts(tiny_tokenizer)[0])
    assert answer == {"role": "assistant", "content": tiny_tokenizer.decode(ids, skip_special_tokens=True)}


def test_a_batch_answers_what_each_gets_alone(llama, tiny_tokenizer):
    model, folder = llama
    tokenizer, theirs = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder).eval()
    chats = [[{"role": "user", "content": question}] for question in (*QUESTIONS, "?")]
    batch = tokenizer.apply_chat_template(
        chats, add_generation_prompt=True, padding=True, return_dict=True, return_tensors="pt"
    )
    answers = theirs.generate(**batch, do_sample=False, max_new_tokens=24)[:, batch["input_ids"].size(1) :]
    assert len({tuple(row.tolist()) for row in answers}) == 4, "the test needs answers that differ"
    for chat, row in zip(chats, answers.tolist(), strict=True):
        alone = greedy(model, render_chat(tiny_tokenizer, chat, add_generation_prompt=True)[0])
        assert row[: len(alone)] == alone
        assert set(row[len(alone) :]) <= {0}


OLD_TEMPLATE = (
    "{% if messages[0]['role'] != 'system' %}{{ '<s>system\\nx</s>\\n' }}{% endif %}{% for message in messages %}"
    "{{ '<s>' + message['role'] + '\\n' + message['content'] + '</s>\\n' }}{% endfor %}"
)


@pytest.mark.parametrize("template", [OLD_TEMPLATE, None, "{{ messages[0]['content'] }}"])
def test_a_folder_has_the_template_of_today_whatever_the_tokenizer_brought(template, tiny_tokenizer, tmp_path):
    """A tokenizer trained long ago, a published one, one of another family: MiniMind is trained with one layout."""
    tiny_tokenizer.save_pretrained(tmp_path / "tokenizer")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "tokenizer")
    tokenizer.chat_template = template
    write_folder(make_model(len(tokenizer)), tokenizer, tmp_path / "llama")
    back = AutoTokenizer.from_pretrained(tmp_path / "llama")
    assert (back.chat_template, back.padding_side) == (CHAT_TEMPLATE, "left")
    assert tokenizer.chat_template == template


def test_published_weights_go_out_and_come_back(shared, tiny_tokenizer, tmp_path):
    for name in ("minimind2_dense_lora", "minimind2_moe"):
        expected = torch.load(shared / f"fixtures/{name}.expected.pt", weights_only=True)
        state = torch.load(shared / f"fixtures/{name}.pth", weights_only=True)
        model = MiniMindLM(LMConfig(**expected["config"])).eval()
        model.load_state_dict({k: v for k, v in state.items() if k in model.state_dict()})
        write_folder(model, tiny_tokenizer, tmp_path / name)
        with torch.no_grad():
            theirs = AutoModelForCausalLM.from_pretrained(tmp_path / name)(expected["input_ids"]).logits
        assert (theirs - expected["logits"]).abs().max() < 1e-4
        back = to_our_state(load_file(tmp_path / name / "model.safetensors"), model.config)
        assert all(torch.equal(value, state[key]) for key, value in back.items())


CHATS = [
    [{"role": "user", "content": a}, {"role": "assistant", "content": b}]
    for a, b in zip(SENTENCES[:4], SENTENCES[4:], strict=True)
]


def sft(folder, tmp_path, chats, settings=None, **changes):
    """trl's trainer for one SFT step on a folder."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    config = SFTConfig(
        output_dir=str(tmp_path / "trl"),
        max_steps=1,
        per_device_train_batch_size=2,
        learning_rate=1e-2,
        report_to=[],
        use_cpu=True,
        bf16=False,
        save_strategy="no",
        **settings or {},
    )
    lines = Dataset.from_list([{"messages": chat} for chat in chats])
    return SFTTrainer(str(folder), args=config, train_dataset=lines, **changes)


def train_a_step(folder, tmp_path, **changes) -> str:
    """Train a folder for one SFT step with trl; returns the folder that it saved."""
    trainer = sft(folder, tmp_path, CHATS, **changes)
    assert math.isfinite(trainer.train().training_loss)
    trainer.save_model(str(tmp_path / "trained"))
    return tmp_path / "trained"


def test_trl_trains_a_llama_on_and_it_comes_back(llama, tmp_path):
    model, folder = llama
    trained = train_a_step(folder, tmp_path)
    back, _ = load_for_inference(trained)
    assert check_equal(back, trained) < 1e-4
    assert not torch.allclose(back.norm.weight, model.norm.weight)


def test_trl_learns_the_answers_alone_and_just_what_we_would(llama, tiny_tokenizer, tmp_path, caplog):
    _, folder = llama
    chats = [CHATS[0] + CHATS[1], [{"role": "system", "content": "Count."}, *CHATS[2]], CHATS[3]]
    trainer = sft(folder, tmp_path, chats, {"assistant_only_loss": True})
    assert trainer.processing_class.chat_template == CHAT_TEMPLATE, "trl has put its own in its place"
    assert "end-of-turn" not in caplog.text
    for row, chat in zip(trainer.train_dataset, chats, strict=True):
        ids, mask = render_chat(tiny_tokenizer, chat)
        assert list(row["input_ids"]) == ids
        assert [label != -100 for label in row["labels"]] == mask
    assert math.isfinite(trainer.train().training_loss)


def test_a_moe_that_transformers_saved_comes_back_and_one_whose_gate_was_trained_is_refused(tiny_tokenizer, tmp_path):
    model = make_model(len(tiny_tokenizer), use_moe=True)
    write_folder(model, tiny_tokenizer, tmp_path)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path)
    theirs.save_pretrained(tmp_path)
    back, _ = load_for_inference(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(back.parameters(), model.parameters(), strict=True))
    torch.nn.init.constant_(theirs.model.layers[1].mlp.shared_expert_gate.weight, 0.1)
    theirs.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="freeze biases and shared_expert_gate"):
        load_for_inference(tmp_path)


def test_peft_puts_an_adapter_on_the_folder(llama, tmp_path):
    from peft import LoraConfig, PeftModel

    model, folder = llama
    peft_config = LoraConfig(r=4, target_modules=["q_proj", "o_proj"], task_type="CAUSAL_LM")
    adapter = train_a_step(folder, tmp_path, peft_config=peft_config)
    base = AutoModelForCausalLM.from_pretrained(folder)
    merged = PeftModel.from_pretrained(base, adapter).merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    AutoTokenizer.from_pretrained(folder).save_pretrained(tmp_path / "merged")
    back, _ = load_for_inference(tmp_path / "merged")
    assert not torch.equal(back.layers[0].attention.wq.weight, model.layers[0].attention.wq.weight)
    assert torch.equal(back.layers[0].attention.wk.weight, model.layers[0].attention.wk.weight)


def test_a_folder_that_computes_something_else_is_noticed(llama, tmp_path):
    model, folder = llama
    copy_folder(folder, tmp_path, {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}})
    with pytest.raises(UserError, match="a different model"):
        check_equal(model, tmp_path)
    assert check_equal(model, folder) < 1e-4


def test_configurations_map_one_to_one():
    for changes in SHAPES.values():
        config = make_model(50, **{"aux_loss_alpha": 0.03 if "use_moe" in changes else 0.1} | changes).config
        shared = {"model.layers.0.mlp.shared_expert.down_proj.weight": torch.ones(1) * config.n_shared_experts}
        theirs = to_their_config(config)
        assert to_our_config(theirs, shared).to_dict() == config.to_dict()
        for place in ("rope_theta", "rope_parameters"):  # transformers 4 saves the first, transformers 5 the second
            without = {key: value for key, value in theirs.items() if key != place}
            assert to_our_config(without, shared).rope_theta == config.rope_theta


def test_all_that_a_config_says():
    """By hand: the settings with which transformers' Llama and Qwen2-MoE compute the same as MiniMind."""
    shape = {"dim": 64, "n_heads": 4, "n_kv_heads": 2, "hidden_dim": 96, "n_layers": 3, "max_seq_len": 200}
    common = {
        **{"vocab_size": 50, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "head_dim": 16},
        **{"num_attention_heads": 4, "num_key_value_heads": 2, "hidden_act": "silu", "max_position_embeddings": 200},
        **{"rms_norm_eps": 1e-6, "rope_theta": 1e4, "initializer_range": 0.02, "tie_word_embeddings": True},
        **{"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}, "attention_dropout": 0.0},
        **{"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "torch_dtype": "float32"},
    }
    dense = make_model(50, **shape, rope_theta=1e4, norm_eps=1e-6).config
    assert to_their_config(dense) == common | {
        **{"architectures": ["LlamaForCausalLM"], "model_type": "llama", "attention_bias": False, "mlp_bias": False}
    }
    experts = {"n_routed_experts": 5, "num_experts_per_tok": 2, "aux_loss_alpha": 0.03}
    moe = make_model(50, **shape, rope_theta=1e4, norm_eps=1e-6, use_moe=True, **experts).config
    assert to_their_config(moe) == common | {
        **{"architectures": ["Qwen2MoeForCausalLM"], "model_type": "qwen2_moe", "moe_intermediate_size": 96},
        **{"shared_expert_intermediate_size": 96, "num_experts": 5, "num_experts_per_tok": 2, "norm_topk_prob": True},
        **{"decoder_sparse_step": 1, "mlp_only_layers": [], "router_aux_loss_coef": 0.03, "qkv_bias": True},
        **{"output_router_logits": False, "use_sliding_window": False, "sliding_window": None, "max_window_layers": 3},
    }


@pytest.mark.parametrize(("norm", "each", "theirs"), [(True, 1, False), (True, 2, True), (False, 2, False)])
def test_a_single_experts_weight_stays_as_it_is(norm, each, theirs):
    config = make_model(50, use_moe=True, n_routed_experts=3, num_experts_per_tok=each, norm_topk_prob=norm).config
    assert to_their_config(config)["norm_topk_prob"] is theirs
