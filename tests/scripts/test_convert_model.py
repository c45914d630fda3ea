"""convert_model.py's command line."""

import importlib
import json
import re
import shutil
import sys
from types import SimpleNamespace

import gguf
import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from model.model_lora import apply_lora, lora_layers, merge_lora, save_lora
from model.tokenizer import tokenizer_hash
from tests.conftest import SPECIAL, train_tokenizer
from tests.model.test_weight_layouts import in_april_2025
from tests.running import ROOT, one_error_line, run_script
from tests.scripts.conversion import make_model, save_model
from trainer.errors import UserError
from trainer.files import file_hash
from trainer.loading import load_for_inference
from trainer.weights import load_weights


@pytest.fixture
def convert(monkeypatch, capsys):
    """Runs the script's main in this process; returns its output."""
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    script = importlib.import_module("scripts.convert_model")

    def run(*arguments) -> str:
        monkeypatch.setattr(sys, "argv", ["convert_model.py", *map(str, arguments)])
        script.main()
        return capsys.readouterr().out

    return run


@pytest.fixture
def weights(tiny_tokenizer, tmp_path):
    return save_model(make_model(len(tiny_tokenizer)), tiny_tokenizer, tmp_path / "full_sft_64.pth")


@pytest.fixture(scope="session")
def small_tokenizer_dir(tmp_path_factory):
    """A tokenizer of 320 entries, like the reference checkpoints' vocabulary."""
    folder = tmp_path_factory.mktemp("tokenizer_320")
    tokenizer = train_tokenizer(SPECIAL, vocab_size=320)
    assert len(tokenizer) == 320
    tokenizer.save_pretrained(folder)
    return folder


def test_a_llama_by_transformers_comes_and_goes_with_all_its_numbers(convert, tokenizer_dir, tiny_tokenizer, tmp_path):
    """Its RoPE base and epsilon differ from MiniMind's, and its special ids are the tokenizer's, not its config's."""
    rope = {"rope_type": "default", "rope_theta": 1e4}
    sizes = {"hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 3, "num_attention_heads": 6}
    numbers = {"num_key_value_heads": 3, "max_position_embeddings": 99, "rms_norm_eps": 1e-6}
    config = LlamaConfig(
        **sizes,
        **numbers,
        vocab_size=len(tiny_tokenizer),
        tie_word_embeddings=True,
        rope_parameters=rope,
        initializer_range=0.3,
        bos_token_id=7,
        eos_token_id=[8, 9],
    )
    torch.manual_seed(0)
    theirs = LlamaForCausalLM(config).eval()
    theirs.save_pretrained(tmp_path / "theirs")
    tiny_tokenizer.save_pretrained(tmp_path / "theirs")
    convert("from-transformers", tmp_path / "theirs", tmp_path / "mine_48.pth")
    told = json.loads((tmp_path / "mine_48.json").read_text())["config"]
    assert (told["rope_theta"], told["norm_eps"], told["max_seq_len"]) == (1e4, 1e-6, 99)
    assert (told["bos_token_id"], told["eos_token_id"]) == (1, 2)
    flags = ("--tokenizer", tokenizer_dir)
    convert("to-transformers", tmp_path / "mine_48.pth", tmp_path / "back", *flags)
    back = AutoModelForCausalLM.from_pretrained(tmp_path / "back").eval()
    assert all(getattr(back.config, name) == value for name, value in (sizes | numbers).items())
    assert back.config.rope_parameters == rope
    assert (back.config.bos_token_id, back.config.eos_token_id, back.config.pad_token_id) == (1, 2, 0)
    ids = torch.randint(len(tiny_tokenizer), (2, 90), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert (back(ids).logits - theirs(ids).logits).abs().max() < 1e-4
    convert("to-gguf", tmp_path / "mine_48.pth", tmp_path / "x.gguf", "--dtype", "f32", *flags)
    reader = gguf.GGUFReader(tmp_path / "x.gguf")
    assert reader.get_field("llama.rope.freq_base").contents() == 1e4
    assert reader.get_field("llama.attention.layer_norm_rms_epsilon").contents() == pytest.approx(1e-6)


def test_the_heads_of_a_file_without_json_order_its_rows(convert, tokenizer_dir, tiny_tokenizer, tmp_path):
    model = make_model(len(tiny_tokenizer))
    torch.save(in_april_2025(model.state_dict(), heads=(4, 2)), tmp_path / "new.pth")
    flags = ("--tokenizer", tokenizer_dir, "--n_heads", "4", "--n_kv_heads", "2", "--max_seq_len", "256")
    convert("to-transformers", tmp_path / "new.pth", tmp_path / "out", *flags)
    back, _ = load_for_inference(tmp_path / "out")
    assert all(torch.equal(value, back.state_dict()[name]) for name, value in model.state_dict().items())


SIZES = ("--n_heads", "4", "--n_kv_heads", "2", "--max_seq_len", "128")


def test_a_published_file_without_json_goes_out_with_its_adapter_and_comes_back(
    convert, shared, small_tokenizer_dir, tmp_path
):
    fixtures = shared / "fixtures"
    base = fixtures / "minimind2_dense_lora.pth"
    expected = torch.load(fixtures / "minimind2_dense_lora.expected.pt", weights_only=True)
    options = ("--tokenizer", small_tokenizer_dir, *SIZES)
    for name, adapter in (("logits", ()), ("lora_logits", ("--lora", fixtures / "minimind2_dense_lora.adapter.pth"))):
        said = convert("to-transformers", base, tmp_path / name, *adapter, *options)
        assert f"vllm serve {tmp_path / name}" in said
        with torch.no_grad():
            logits = AutoModelForCausalLM.from_pretrained(tmp_path / name)(expected["input_ids"]).logits
        assert (logits - expected[name]).abs().max() < 1e-4
    convert("from-transformers", tmp_path / "logits", tmp_path / "back.pth")
    state, back = torch.load(base, weights_only=True), torch.load(tmp_path / "back.pth", weights_only=True)
    assert back.keys() == state.keys() - {"pos_cis"}
    assert all(torch.equal(back[key], state[key]) for key in back)
    settings = json.loads((tmp_path / "back.json").read_text())
    assert {k: settings["config"][k] for k in expected["config"]} == expected["config"]


def test_a_merged_adapter_is_in_the_weights(convert, tiny_tokenizer, tokenizer_dir, weights, tmp_path):
    model = load_weights(weights, None, tiny_tokenizer)
    apply_lora(model, rank=4)
    for layer in lora_layers(model).values():
        torch.nn.init.normal_(layer.lora.B.weight)
    about = json.loads(weights.with_suffix(".json").read_text())
    save_lora(model, tmp_path / "lora/name_64.pth", config=about["config"], tokenizer=about["tokenizer"])
    out = tmp_path / "merged_64.pth"
    convert("merge-lora", weights, tmp_path / "lora/name_64.pth", out, "--tokenizer", tokenizer_dir)
    merge_lora(model)
    merged = load_weights(out, None, tiny_tokenizer)
    assert all(torch.equal(value, merged.state_dict()[key]) for key, value in model.state_dict().items())
    settings = json.loads(out.with_suffix(".json").read_text())
    assert settings["stage"] == "full_sft"
    assert settings["merged"].endswith("name_64.pth")
    assert settings["tokenizer"] == tokenizer_hash(tiny_tokenizer)

    other = save_model(make_model(len(tiny_tokenizer), dim=32), tiny_tokenizer, tmp_path / "full_sft_32.pth")
    with pytest.raises(UserError, match="another base"):
        convert("merge-lora", other, tmp_path / "lora/name_64.pth", tmp_path / "x.pth", "--tokenizer", tokenizer_dir)
    with pytest.raises(UserError, match="train_lora"):
        convert("merge-lora", other, tmp_path / "nothing.pth", tmp_path / "x.pth", "--tokenizer", tokenizer_dir)
    assert not (tmp_path / "x.pth").exists()


def test_what_is_written_is_known_by_its_own_hash(convert, tiny_tokenizer, tokenizer_dir, weights, tmp_path):
    """Not by the hash of the weights that it was made from."""
    beside = weights.with_suffix(".json")
    beside.write_text(json.dumps(json.loads(beside.read_text()) | {"sha256": file_hash(weights)}))
    model = load_weights(weights, None, tiny_tokenizer)
    apply_lora(model, rank=4)
    about = json.loads(beside.read_text())
    save_lora(model, tmp_path / "name.pth", config=about["config"], tokenizer=about["tokenizer"])
    out = tmp_path / "merged_64.pth"
    convert("merge-lora", weights, tmp_path / "name.pth", out, "--tokenizer", tokenizer_dir)
    assert json.loads(out.with_suffix(".json").read_text())["sha256"] == file_hash(out) != file_hash(weights)
    load_weights(out, None, tiny_tokenizer)


def test_a_folder_and_files_under_links_are_written_where_they_lie(
    convert, tokenizer_dir, weights, tmp_path, monkeypatch
):
    """They are written on the link's target disk: no folder is moved between it and the disk of the link."""
    folder, big = tmp_path / "folder", tmp_path / "disk" / "big"
    big.mkdir(parents=True)
    folder.symlink_to(big)
    moved_from = []
    monkeypatch.setattr(shutil, "move", lambda file, to: moved_from.append(file.parent.parent) or shutil.copy(file, to))
    (big / "elsewhere").mkdir()
    (big / "model.safetensors").symlink_to(big / "elsewhere" / "weights")
    convert("to-transformers", weights, folder, "--tokenizer", tokenizer_dir, "--overwrite")
    assert folder.is_symlink()
    assert (big / "model.safetensors").is_symlink()
    assert (big / "elsewhere" / "weights").stat().st_size > 10_000
    assert set(moved_from) == {big.parent}
    assert not [*tmp_path.glob(".*"), *big.parent.glob(".*")]


def test_gguf_gets_a_modelfile_beside_it_and_nothing_is_replaced_unasked(convert, tokenizer_dir, weights, tmp_path):
    out = tmp_path / "tiny.gguf"
    said = convert("to-gguf", weights, out, "--dtype", "q8_0", "--tokenizer", tokenizer_dir)
    assert f"ollama create tiny -f {tmp_path / 'tiny.Modelfile'}" in said
    assert "FROM ./tiny.gguf\n" in (tmp_path / "tiny.Modelfile").read_text()
    size = out.stat().st_size
    with pytest.raises(UserError, match="--overwrite"):
        convert("to-gguf", weights, out, "--tokenizer", tokenizer_dir)
    assert out.stat().st_size == size
    convert("to-gguf", weights, out, "--dtype", "f32", "--tokenizer", tokenizer_dir, "--overwrite")
    assert out.stat().st_size > 2 * size


def test_a_folder_or_weights_that_are_there_stay(convert, tokenizer_dir, weights, tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "mine.txt").write_text("mine")
    convert("to-transformers", weights, folder, "--tokenizer", tokenizer_dir)
    assert (folder / "mine.txt").read_text() == "mine"
    with pytest.raises(UserError, match="already contains a model"):
        convert("to-transformers", weights, folder, "--tokenizer", tokenizer_dir)
    other = tmp_path / "tokenizer"
    other.mkdir()
    (other / "tokenizer.json").write_text("mine")
    with pytest.raises(UserError, match=r"tokenizer\.json already exists"):
        convert("to-transformers", weights, other, "--tokenizer", tokenizer_dir)
    assert [(file.name, file.read_text()) for file in other.iterdir()] == [("tokenizer.json", "mine")]
    with pytest.raises(UserError, match="the path is not UTF-8"):
        convert("to-transformers", "/nowhere", tmp_path / "a\udcff", "--tokenizer", tokenizer_dir)
    with pytest.raises(UserError, match="is a file"):
        convert("to-transformers", weights, weights, "--tokenizer", tokenizer_dir)
    with pytest.raises(UserError, match="already exists"):
        convert("from-transformers", folder, weights)
    with pytest.raises(UserError, match=r"writes a \.pth"):
        convert("from-transformers", folder, tmp_path / "x.json")
    assert not [name for name in tmp_path.iterdir() if name.name.startswith(".")]


def test_wrong_input_is_named(convert, tokenizer_dir, small_tokenizer_dir, weights, shared, tmp_path):
    vlm = shared / "fixtures/minimind2_v.pth"
    for message, arguments in (
        ("run train_full_sft.py", (tmp_path / "full_sft_999.pth", "--tokenizer", tokenizer_dir)),
        ("was trained with tokenizer", (weights,)),
        ("n_layers 3", (weights, "--tokenizer", tokenizer_dir, "--n_layers", "3")),
        ("vocab_size 320", (shared / "fixtures/minimind2_moe.pth", "--tokenizer", tokenizer_dir)),
        ("n_heads 3", (weights, "--tokenizer", tokenizer_dir, "--n_heads", "3")),
        ("vision-language", (vlm, "--tokenizer", small_tokenizer_dir, *SIZES)),
    ):
        with pytest.raises(UserError, match=message):
            convert("to-transformers", *arguments[:1], tmp_path / "out", *arguments[1:])
    with pytest.raises(UserError, match=r"an adapter is a \.pth file"):
        convert("to-peft", weights, tmp_path / "lora/me_32", tmp_path / "out", "--tokenizer", tokenizer_dir)
    with pytest.raises(UserError, match=r"put positional arguments before it"):
        convert("to-transformers", "--overwrite", weights, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_errors_end_in_one_line(tmp_path):
    done = run_script("scripts/convert_model.py", "from-transformers", tmp_path, tmp_path / "x.pth", exit_code=2)
    assert "config.json is missing" in one_error_line(done)


def test_a_json_beside_the_target_is_not_replaced_either(tmp_path):
    from scripts.convert_model import check_targets

    (tmp_path / "mine.json").write_text("{}")
    args = SimpleNamespace(out=tmp_path / "mine.pth", overwrite=False, command="from-transformers")
    with pytest.raises(UserError, match=r"mine\.json already exists"):
        check_targets(args, ".pth", ".json")


def test_what_every_conversion_says_and_leaves(convert, tiny_tokenizer, tokenizer_dir, weights, tmp_path):
    flags = ("--tokenizer", tokenizer_dir)
    said = convert("to-transformers", weights, tmp_path / "llama", *flags).splitlines()
    assert re.fullmatch(
        rf"{tmp_path}/llama: transformers loads it, its logits within \d\.\de-\d\d of MiniMind's", said[0]
    )
    assert said[1:] == [f"vllm serve {tmp_path}/llama --max-model-len 256"]
    said = convert("from-transformers", tmp_path / "llama", tmp_path / "back.pth")
    assert re.fullmatch(
        rf"{tmp_path}/back\.pth: 0\.1 M parameters, logits within \d\.\de-\d\d of transformers'\n", said
    )
    about = json.loads((tmp_path / "back.json").read_text())
    assert (about["stage"], about["data_path"]) == ("converted", str(tmp_path / "llama"))
    assert about["config"]["max_seq_len"] == 256
    said = convert("to-gguf", weights, tmp_path / "tiny.gguf", *flags).splitlines()
    megabytes = (tmp_path / "tiny.gguf").stat().st_size / 1e6
    assert said[0] == f"{tmp_path}/tiny.gguf: {megabytes:.1f} MB, for llama.cpp"
    kinds = {tensor.tensor_type for tensor in gguf.GGUFReader(tmp_path / "tiny.gguf").tensors}
    assert kinds == {gguf.GGMLQuantizationType.F16, gguf.GGMLQuantizationType.F32}
    model = load_weights(weights, None, tiny_tokenizer)
    apply_lora(model, rank=4, alpha=8, targets=["wq", "w2"])
    save_lora(model, tmp_path / "me.pth")
    for layout, base in (("llama", "to-transformers makes"), ("minimind", "save_pretrained writes")):
        said = convert("to-peft", weights, tmp_path / "me.pth", tmp_path / layout / "peft", "--layout", layout, *flags)
        assert said == f"{tmp_path / layout / 'peft'}: for peft, on the model that {base}\n"
        with pytest.raises(UserError, match="already contains an adapter"):
            convert("to-peft", weights, tmp_path / "me.pth", tmp_path / layout / "peft", *flags)
        back = tmp_path / f"{layout}.pth"
        said = convert("from-peft", tmp_path / layout / "peft", weights, back, *flags)
        assert said == f"{back}: rank 4 on wq, w2, for {weights}\n"
        about = json.loads(back.with_suffix(".json").read_text())
        assert (about["rank"], about["alpha"], about["base"]) == (4, 8, weights.name)
        assert about["data_path"] == str(tmp_path / layout / "peft")
        assert about["sha256"] == file_hash(back)


def test_a_server_is_told_a_context_of_8192_at_most(convert, tiny_tokenizer, tokenizer_dir, tmp_path):
    long = save_model(make_model(len(tiny_tokenizer), max_seq_len=8193), tiny_tokenizer, tmp_path / "long_64.pth")
    said = convert("to-transformers", long, tmp_path / "llama", "--tokenizer", tokenizer_dir)
    assert said.endswith("--max-model-len 8192\n")


@pytest.mark.parametrize(
    ("name", "there", "overwrite", "told"),
    [
        ("a.pth", (), False, None),
        ("a.pth", ("a.pth",), True, None),
        ("a.pth", ("a.json",), True, None),
        ("a.pth", ("a.pth",), False, r"a\.pth already exists"),
        ("a.pth", ("a.json",), False, r"a\.json already exists"),
        ("a.pth", ("a.gguf",), False, None),
        ("a.pt", (), True, r"a\.pt: merge-lora writes a \.pth file"),
        ("pth", (), True, r"pth: merge-lora writes a \.pth file"),
    ],
)
def test_what_may_be_written_where(tmp_path, name, there, overwrite, told):
    from scripts.convert_model import check_targets

    for file in there:
        (tmp_path / file).touch()
    args = SimpleNamespace(out=tmp_path / name, overwrite=overwrite, command="merge-lora")
    if told is None:
        check_targets(args, ".pth", ".json")
    else:
        with pytest.raises(UserError, match=told):
            check_targets(args, ".pth", ".json")
