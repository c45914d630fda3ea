"""Fixtures for all tests."""

import json
import os
import signal
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from model.chat_template import CHAT_TEMPLATE
from tests.running import ROOT, TINY_TRAINING, run_script

SPECIAL = ["<unk>", "<s>", "</s>"]
TAGS = ["<think>", "</think>", "<answer>", "</answer>", "<image>"]
SENTENCES = [
    "The little robot counts apples: 12 + 30 = 42, and then it counts them again.",
    "What is the capital of the green island? The capital of the green island is Harbour Town.",
    "A teacher and a student read a book about the sea, the sky and seven yellow birds.",
    "def add(a, b):\n    return a + b\n\nprint(add(1, 2))",
    "你好，请问今天的天气怎么样？今天天气很好，适合出去散步。",
    "小机器人会数苹果，也会回答问题。老师和学生一起读一本关于大海的书。",
    "绿色的小岛上有一座城市，城市里有七只黄色的小鸟。",
    "user assistant system: every question has an answer, every answer has an end.",
]


# Files whose tests compute next to nothing: `make quick` runs them alone, in less than a minute.
QUICK = (
    *("test_config", "test_chat", "test_reasoning", "test_tokenizer", "test_images"),
    *("test_jsonl", "test_records", "test_shapes", "test_packing", "test_loader"),
    *("test_arguments", "test_schedule", "test_files", "test_errors", "test_launcher", "test_device"),
    *("test_scoring", "test_imports", "test_requirements"),
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.stem in QUICK and item.path.parent.name != "stages":
            item.add_marker(pytest.mark.quick)


def pytest_configure() -> None:
    """Let scripts under test receive Ctrl-C even if the suite runs in the background, where it is ignored, and keep
    requests to this machine away from proxies."""
    for name in [name for name in os.environ if name.lower() in ("http_proxy", "https_proxy", "all_proxy")]:
        del os.environ[name]
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real text and reference logits beside the repository; without it the test is skipped."""
    folder = ROOT.parent / "shared"
    if not folder.is_dir():
        pytest.skip("../shared is not here")
    return folder


@pytest.fixture(scope="session")
def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE of a few hundred entries, in the shipped one's order: 3 special tokens, then the 5 tags."""
    return train_tokenizer(SPECIAL + TAGS)


@pytest.fixture(scope="session")
def plain_tokenizer() -> PreTrainedTokenizerFast:
    """The same without entries for the tags, like MiniMind2's published tokenizer: a tag is several tokens."""
    return train_tokenizer(SPECIAL)


@pytest.fixture(scope="session")
def tokenizer_dir(tiny_tokenizer, tmp_path_factory) -> Path:
    """`tiny_tokenizer` saved in a folder for --tokenizer."""
    folder = tmp_path_factory.mktemp("tokenizer")
    tiny_tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory) -> Path:
    """A folder with a few dozen lines for pretraining and SFT, under the project's file names."""
    folder = tmp_path_factory.mktemp("data")
    texts = [f"{n}. {SENTENCES[n % 8]} {SENTENCES[(n + 3) % 8]}"[: 40 + n] for n in range(60)]
    write_jsonl(folder / "pretrain_hq.jsonl", [{"text": text} for text in texts])
    chats = [
        [{"role": "user", "content": SENTENCES[n % 8][:24]}, {"role": "assistant", "content": SENTENCES[(n + 1) % 8]}]
        for n in range(40)
    ]
    write_jsonl(folder / "sft_mini_512.jsonl", [{"conversations": chat} for chat in chats])
    return folder


@pytest.fixture(scope="session")
def tiny_out(tiny_data, tokenizer_dir, tmp_path_factory) -> Path:
    """An --out_dir with pretrain_32 and full_sft_32, trained by the real scripts. Read or copy it; do not change it."""
    out = tmp_path_factory.mktemp("out")
    common = ("--out_dir", out, "--tokenizer", tokenizer_dir, *TINY_TRAINING, "--epochs", "4")
    run_script("train_pretrain.py", *common, "--data_path", tiny_data / "pretrain_hq.jsonl", "--max_steps", "4")
    run_script("train_full_sft.py", *common, "--data_path", tiny_data / "sft_mini_512.jsonl", "--max_steps", "4")
    return out


def write_jsonl(path: Path, records: list[dict]) -> Path:
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), encoding="utf-8")
    return path


def train_tokenizer(added: list[str], vocab_size: int = 600) -> PreTrainedTokenizerFast:
    """A byte-level BPE trained on SENTENCES, with `added` as its first entries."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=added, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(SENTENCES, trainer)
    state = json.loads(backend.to_str())
    for token in state["added_tokens"]:  # the trainer marks all of them as special
        token["special"] = token["content"] in SPECIAL
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(state)),
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<unk>",
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


@pytest.fixture(scope="session")
def clip_dir(tmp_path_factory) -> Path:
    """A CLIP folder for --vision_model with random weights: 32 x 32 pixels, 4 patches, width 16."""
    from transformers import CLIPConfig, CLIPModel

    half = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = half | {"vocab_size": 99, "max_position_embeddings": 16, "bos_token_id": 97, "eos_token_id": 98}
    torch.manual_seed(0)
    clip = CLIPModel(CLIPConfig(text_config=text, vision_config=half | {"image_size": 32, "patch_size": 16}))
    folder = tmp_path_factory.mktemp("clip")
    clip.save_pretrained(folder)
    return folder
