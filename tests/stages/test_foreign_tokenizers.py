"""Tokenizers of other families in every stage: they stop, serve and export like ours, or are refused at once."""

import json
import re

import gguf
import pytest
import torch
from fastapi.testclient import TestClient
from transformers import AutoModelForCausalLM, AutoTokenizer

from model.chat import render_chat
from model.inference.scheduler import Engine
from model.inference.thread import EngineThread
from scripts.serving.app import ServerState, make_app
from tests.conftest import SENTENCES, write_jsonl
from tests.families import FAMILIES, family, unigram
from tests.running import TINY, TINY_TRAINING, call_script
from tests.stages.training import about, losses, reports
from trainer.weights import load_tokenizer, load_weights

ANSWER = "The sea is blue. 大海。"
CHAT = [{"role": "user", "content": "sea?"}, {"role": "assistant", "content": ANSWER}]


def add_setting(folder, setting: str) -> None:
    """Set a key in a folder's tokenizer_config.json."""
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | json.loads("{" + setting + "}")))


@pytest.fixture(scope="module", params=["gpt2", "llama3", "qwen with bos"])
def trained(request, tmp_path_factory):
    """Weights pretrained for two steps and fine-tuned on one answer with a family's tokenizer; (out, tokenizer dir)."""
    folder = tmp_path_factory.mktemp("family")
    family(request.param).save_pretrained(folder / "tokenizer")
    texts = write_jsonl(folder / "texts.jsonl", [{"text": text} for text in SENTENCES])
    chats = write_jsonl(folder / "chats.jsonl", [{"conversations": CHAT}] * 8)
    common = (*TINY_TRAINING, "--out_dir", folder, "--tokenizer", folder / "tokenizer", "--max_seq_len", "128")
    for script, data, *flags in (
        ("train_pretrain.py", texts, "--max_steps", "2"),
        ("train_full_sft.py", chats, "--max_steps", "60", "--epochs", "60", "--learning_rate", "0.02", "--no-packing"),
    ):
        call_script(script, *common, "--data_path", data, "--eval_path", data, "--eval_interval", "20", *flags)
    return folder, folder / "tokenizer"


def test_training_evaluates_and_the_json_tells_the_ids(trained):
    out, folder = trained
    tokenizer = load_tokenizer(folder)
    assert losses(out, "full_sft_32")[-1] < 0.3
    assert [line for line in reports(out, "pretrain_32") if line.get("eval_bits_per_byte", 0) > 0]
    config = about(out, "full_sft_32")["config"]
    assert (config["bos_token_id"], config["eos_token_id"]) == (tokenizer.bos_token_id, tokenizer.eos_token_id)


def test_the_model_stops_by_itself(trained, capsys):
    out, folder = trained
    asking = ("--out_dir", out, "--tokenizer", folder, "--prompt", "sea?", "--temperature", "0")
    call_script("eval_model.py", *TINY, *asking, "--max_new_tokens", "100")
    printed = capsys.readouterr()
    assert ANSWER in printed.out
    assert int(re.search(r"\[(\d+) tokens", printed.err)[1]) < 60
    tokenizer = load_tokenizer(folder)
    model = load_weights(out / "full_sft_32.pth", None, tokenizer).eval()
    ids, _ = render_chat(tokenizer, CHAT[:1], add_generation_prompt=True)
    written = model.generate(torch.tensor([ids]), max_new_tokens=100)[0, len(ids) :].tolist()
    assert written[-1] == tokenizer.eos_token_id
    assert tokenizer.decode(written[:-1]) == ANSWER
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id


def test_the_server_says_stop(trained):
    out, folder = trained
    tokenizer = load_tokenizer(folder)
    thread = EngineThread(Engine(load_weights(out / "full_sft_32.pth", None, tokenizer).eval(), tokenizer, slots=1))
    try:
        client = TestClient(make_app(ServerState(thread, tokenizer, None, None, reasoning=False, capacity=2), None, ()))
        body = {"model": "minimind", "messages": CHAT[:1], "temperature": 0, "max_tokens": 100}
        (choice,) = client.post("/v1/chat/completions", json=body).json()["choices"]
    finally:
        thread.close()
    assert (choice["message"]["content"], choice["finish_reason"]) == (ANSWER, "stop")


def test_the_exported_folder_speaks_and_stops_as_ours(trained, tmp_path, capsys):
    out, folder = trained
    call_script("scripts/convert_model.py", "to-transformers", out / "full_sft_32.pth", tmp_path, "--tokenizer", folder)
    tokenizer, model = AutoTokenizer.from_pretrained(tmp_path), AutoModelForCausalLM.from_pretrained(tmp_path)
    ours = load_tokenizer(folder)
    ids = tokenizer.apply_chat_template(CHAT[:1], tokenize=True, add_generation_prompt=True, return_dict=False)
    assert ids == render_chat(ours, CHAT[:1], add_generation_prompt=True)[0]
    for config in (model.config, model.generation_config):
        assert (config.bos_token_id, config.eos_token_id) == (ours.bos_token_id, ours.eos_token_id)
        assert config.pad_token_id == tokenizer.pad_token_id is not None
    written = model.generate(torch.tensor([ids]), do_sample=False, max_new_tokens=100)[0, len(ids) :].tolist()
    assert tokenizer.decode(written, skip_special_tokens=True) == ANSWER
    call_script("scripts/convert_model.py", "from-transformers", tmp_path, tmp_path / "back.pth")
    back = load_weights(tmp_path / "back.pth", None, ours)
    assert (back.config.eos_token_id, back.config.pad_token_id) == (ours.eos_token_id, ours.pad_token_id)


def test_gguf_and_modelfile_name_its_own_tokens(trained, tmp_path):
    out, folder = trained
    call_script(
        *("scripts/convert_model.py", "to-gguf", out / "full_sft_32.pth", tmp_path / "x.gguf", "--tokenizer", folder)
    )
    tokenizer, reader = load_tokenizer(folder), gguf.GGUFReader(tmp_path / "x.gguf")
    for name, ours in (("bos", tokenizer.bos_token_id), ("eos", tokenizer.eos_token_id)):
        assert reader.get_field(f"tokenizer.ggml.{name}_token_id").contents() == ours
    assert reader.get_field("tokenizer.ggml.padding_token_id").contents() == tokenizer.pad_token_id
    text = (tmp_path / "x.Modelfile").read_text(encoding="utf-8")
    assert f'PARAMETER stop "{tokenizer.eos_token}"' in text
    assert f"{{{{ range .Messages }}}}{tokenizer.bos_token}{{{{ .Role }}}}" in text
    assert "<s>" not in text + reader.get_field("tokenizer.chat_template").contents()


def test_what_is_refused_is_refused_before_the_data_is_read(tmp_path, capsys):
    """A tokenizer without bos works once its settings are corrected as the error line says."""
    unigram().save_pretrained(tmp_path / "t5")
    family("qwen").save_pretrained(tmp_path / "qwen")
    train = ("train_pretrain.py", *TINY_TRAINING, "--out_dir", tmp_path / "out", "--max_steps", "1")
    for name, told in (("t5", "not a byte-level BPE"), ("qwen", "no bos token")):
        call_script(*train, "--data_path", "/nowhere", "--tokenizer", tmp_path / name, exit_code=2)
        line = capsys.readouterr().err.strip()
        assert line.startswith(f"error: --tokenizer {tmp_path / name}: it ")
        assert told in line
        assert "\n" not in line
    add_setting(tmp_path / "qwen", re.search(r"write (.+) into its", line)[1])
    data = write_jsonl(tmp_path / "texts.jsonl", [{"text": text} for text in SENTENCES])
    call_script(*train, "--data_path", data, "--tokenizer", tmp_path / "qwen")
    assert about(tmp_path / "out")["config"]["bos_token_id"] == 401
    for script in ("eval_model.py", "scripts/convert_model.py"):
        flags = ("to-gguf", tmp_path / "out/pretrain_32.pth", tmp_path / "x.gguf") if "convert" in script else TINY
        call_script(script, *flags, "--tokenizer", tmp_path / "t5", exit_code=2)
        assert "not a byte-level BPE" in capsys.readouterr().err


def test_the_same_entries_with_another_end_are_not_the_same_tokenizer(tmp_path, capsys):
    """The hash of the entries is the same, but the json beside the weights also contains the end token."""
    for name in ("qwen with bos", "changed"):
        family("qwen with bos").save_pretrained(tmp_path / name)
    add_setting(tmp_path / "changed", '"eos_token": "<|endoftext|>"')
    data = write_jsonl(tmp_path / "chats.jsonl", [{"conversations": CHAT}] * 4)
    texts = write_jsonl(tmp_path / "texts.jsonl", [{"text": text} for text in SENTENCES])
    common = (*TINY_TRAINING, "--out_dir", tmp_path / "out", "--max_steps", "1")
    train = ("train_pretrain.py", *common, "--data_path", texts)
    call_script(*train, "--tokenizer", tmp_path / "qwen with bos")
    sft = ("train_full_sft.py", *common, "--data_path", data, "--max_seq_len", "128")
    call_script(*sft, "--tokenizer", tmp_path / "changed", exit_code=2)
    assert "was trained with eos_token_id 402, but" in capsys.readouterr().err
    call_script(*train, "--tokenizer", tmp_path / "changed", "--resume", exit_code=2)
    assert "eos_token_id 402, this one has 400" in capsys.readouterr().err
    path = tmp_path / "out" / "pretrain_32.json"  # of a run from before the ids were saved
    old = json.loads(path.read_text())
    for name in ("bos_token_id", "eos_token_id"):
        del old["config"][name]
    path.write_text(json.dumps(old))
    call_script(*sft, "--tokenizer", tmp_path / "qwen with bos")
    assert about(tmp_path / "out", "full_sft_32")["config"]["eos_token_id"] == 402


def test_families_differ_in_what_matters_here():
    for name, (_, roles) in FAMILIES.items():
        tokenizer = family(name)
        assert tokenizer.eos_token_id != 2, name
        assert (tokenizer.bos_token_id is None) == ("bos_token" not in roles), name
