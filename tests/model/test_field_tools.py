"""A folder from `save_pretrained` used with common training tools: trl and peft."""

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

from model import LMConfig, MiniMindLM

QUESTIONS = ("What is red?", "What is blue?", "你好吗？", "Who are you?")
LORA = {"r": 4, "target_modules": ["wq", "wo"], "task_type": "CAUSAL_LM"}


@pytest.fixture(scope="module")
def folder(tiny_tokenizer, tmp_path_factory):
    """A random MiniMind and its tokenizer, saved by transformers."""
    folder = tmp_path_factory.mktemp("minimind")
    torch.manual_seed(0)
    MiniMindLM(LMConfig(dim=32, n_layers=2, vocab_size=len(tiny_tokenizer))).save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def settings(tmp_path):
    """The settings of all trainers: two steps on the CPU, in fp32, without reports."""
    return {
        "output_dir": str(tmp_path / "trained"),
        "max_steps": 2,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-2,
        "max_length": 128,
        "logging_steps": 1,
        "use_cpu": True,
        "bf16": False,
        "report_to": [],
        "disable_tqdm": True,
    }


def chat(question: str, answer: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def losses(trainer) -> list[float]:
    return [line["loss"] for line in trainer.state.log_history if "loss" in line]


def how_far(model, folder) -> float:
    """The largest change of a model's embedding from the folder's."""
    before = MiniMindLM.from_pretrained(folder)
    return (model.tok_embeddings.weight - before.tok_embeddings.weight).abs().max().item()


def test_sft_trainer(folder, settings):
    lines = Dataset.from_list([{"messages": chat(question, "Red and blue.")} for question in QUESTIONS])
    trainer = SFTTrainer(str(folder), args=SFTConfig(**settings), train_dataset=lines)
    assert isinstance(trainer.model, MiniMindLM)
    trainer.train()
    first, last = losses(trainer)
    assert last < first < 8
    assert how_far(trainer.model, folder) > 1e-3
    trainer.save_model(settings["output_dir"])
    again = AutoModelForCausalLM.from_pretrained(settings["output_dir"])
    ids = torch.tensor([[1, 50, 60, 70]])
    torch.testing.assert_close(again(ids).logits, trainer.model.eval()(ids).logits)


def test_dpo_trainer(folder, settings):
    pairs = [{"prompt": chat(question, "")[:1], "chosen": chat(question, "Yes.")[1:]} for question in QUESTIONS]
    pairs = Dataset.from_list([pair | {"rejected": chat("", "No, no.")[1:]} for pair in pairs])
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    trainer = DPOTrainer(model, args=DPOConfig(**settings), train_dataset=pairs, processing_class=tokenizer)
    trainer.train()
    first, last = losses(trainer)
    assert first == pytest.approx(0.6931, abs=1e-3)  # log 2: policy and reference still agree
    assert last < first
    assert how_far(trainer.model, folder) > 1e-3


def test_peft_trains_an_adapter_and_nothing_else(folder, settings):
    lines = Dataset.from_list([{"messages": chat(question, "Red and blue.")} for question in QUESTIONS])
    trainer = SFTTrainer(str(folder), args=SFTConfig(**settings), train_dataset=lines, peft_config=LoraConfig(**LORA))
    trainer.train()
    first, last = losses(trainer)
    assert last < first
    trainer.save_model(settings["output_dir"])
    base = AutoModelForCausalLM.from_pretrained(folder)
    ids = torch.tensor([[1, 50, 60, 70]])
    plain = base(ids).logits
    adapted = PeftModel.from_pretrained(base, settings["output_dir"])
    assert (adapted(ids).logits - plain).abs().max() > 1e-4
    with adapted.disable_adapter():
        torch.testing.assert_close(adapted(ids).logits, plain, rtol=0, atol=0)


def test_a_switch_that_minimind_does_not_have_is_refused(folder):
    model, ids = MiniMindLM.from_pretrained(folder), torch.tensor([[1, 50]])
    model(ids, output_attentions=None, output_hidden_states=False, return_dict=True)
    for wrong in ({"output_attentions": True}, {"atention_mask": None}):
        with pytest.raises(TypeError, match=f"forward does not support {next(iter(wrong))}"):
            model(ids, **wrong)
