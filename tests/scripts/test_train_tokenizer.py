"""scripts/train_tokenizer.py as a user runs it, its checks, and the shipped tokenizer."""

import ast
import json
from collections import Counter

import pytest
from tokenizers import Tokenizer, pre_tokenizers
from transformers import AutoTokenizer

from dataset.jsonl import BadRecord
from model.chat import render_chat
from model.tokenizer import StreamDecoder, token_bytes
from model.tokenizer_check import PROBES
from scripts import train_tokenizer as script
from scripts.train_tokenizer import (
    characters_per_token,
    detect_kind,
    is_held_out_text,
    save,
    stream_texts,
    texts_in,
    train,
    verify,
)
from tests.conftest import SENTENCES, train_tokenizer, write_jsonl
from tests.running import ROOT, call_script, one_error_line, run_script
from trainer.errors import UserError
from trainer.weights import SHIPPED_TOKENIZER, load_tokenizer

CHATS = [
    [{"role": "user", "content": "你好, world"}, {"role": "assistant", "content": "Hi 🙂"}],
    [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": "a"},
    ],
]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Data files with lines in each of the project's formats."""
    folder = tmp_path_factory.mktemp("tokenizer_data")
    write_jsonl(folder / "texts.jsonl", [{"text": f"{n} {SENTENCES[n % 8]}"} for n in range(300)])
    write_jsonl(folder / "medical.jsonl", [{"conversations": [*CHATS[1]]}, {"conversations": CHATS[0]}])
    write_jsonl(folder / "pairs.jsonl", [{"chosen": CHATS[1], "rejected": [*CHATS[1][:2], CHATS[0][1]], "id": 1}])
    return folder


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory):
    """A tokenizer folder written by the script, and the script's output."""
    folder = tmp_path_factory.mktemp("trained") / "tiny"
    paths = sorted(data.glob("*.jsonl"))
    done = run_script("scripts/train_tokenizer.py", "--data_path", *paths, "--out_dir", folder, "--vocab_size", "420")
    assert done.stderr.count(f"{data / 'pairs.jsonl'}: ignored keys: id 1\n") == 1
    return folder, done.stdout


def test_the_script_writes_a_folder_that_auto_tokenizer_loads(trained):
    folder, printed = trained
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)

    assert len(tokenizer) == 420
    assert printed.splitlines()[0].startswith(f"420 entries in {folder}")
    assert "English" in printed
    assert "characters per token, on held-out texts" in printed
    assert tokenizer.convert_tokens_to_ids(["<unk>", "<s>", "</s>"]) == [0, 1, 2]
    special = (tokenizer.unk_token, tokenizer.pad_token, tokenizer.bos_token, tokenizer.eos_token)
    assert special == ("<unk>", "<unk>", "<s>", "</s>")
    assert tokenizer.padding_side == "left"  # a batch is extended at the end of its rows
    for tag in ("<think>", "</think>", "<answer>", "</answer>", "<image>"):
        (entry,) = tokenizer.encode(tag, add_special_tokens=False)
        assert not tokenizer.added_tokens_decoder[entry].special
    assert not [path for path in folder.parent.iterdir() if path != folder]  # no temporary files are left
    verify(tokenizer)


def test_digits_are_single_tokens(trained):
    tokenizer = load_tokenizer(trained[0])
    assert [tokenizer.decode(i) for i in tokenizer.encode("12345", add_special_tokens=False)] == list("12345")


@pytest.mark.parametrize("chat", CHATS)
@pytest.mark.parametrize("add_generation_prompt", [False, True])
def test_the_saved_chat_template_lays_out_what_render_chat_does(trained, chat, add_generation_prompt):
    for folder in (trained[0], SHIPPED_TOKENIZER):
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        by_template = tokenizer.apply_chat_template(
            chat, tokenize=True, add_generation_prompt=add_generation_prompt, return_dict=False
        )
        assert by_template == render_chat(tokenizer, chat, add_generation_prompt)[0]


def test_a_tokenizer_that_is_there_is_not_overwritten_and_can_be_measured(trained, data):
    folder, printed = trained
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    common = ("--data_path", *sorted(data.glob("*.jsonl")), "--out_dir", folder)

    refused = run_script("scripts/train_tokenizer.py", *common, exit_code=2)
    assert f"{folder} already has a tokenizer" in one_error_line(refused)
    assert "--overwrite" in one_error_line(refused)

    measured = run_script("scripts/train_tokenizer.py", *common, "--only_measure")
    assert measured.stdout == printed  # both the training and the printed measurements are deterministic
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_the_least_vocabulary_is_of_the_bytes_and_the_tags_alone(data, tmp_path):
    run_script(
        "scripts/train_tokenizer.py",
        *("--data_path", data / "texts.jsonl", "--out_dir", tmp_path / "least", "--vocab_size", "264"),
    )
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "least", local_files_only=True)
    assert len(tokenizer) == 264
    assert tokenizer.decode(tokenizer.encode("任何 text")) == "任何 text"


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--vocab_size", "263"], "--vocab_size 263 is too small for the 256 bytes and 8 tags"),
        (["--holdout", "1"], "--holdout must be from 0 to below 1"),
        (["--data_path", "missing.jsonl"], "missing.jsonl does not exist"),
        (["--data_path", "bad.jsonl"], 'line 2: neither "text" nor "conversations"'),
        (["--out_dir", "bad.jsonl/folder"], "folder cannot be written: Not a directory"),
        (["--out_dir", "a\udcff"], "a\\udcff: the path is not UTF-8"),
        (["--only_measure", "--out_dir", "."], "no tokenizer.json there"),
        (["--only_measure", "--out_dir", "damaged"], "damaged cannot be loaded (Invalid control character"),
        (["--only_measure", "--out_dir", "other"], "other cannot be loaded ("),
    ],
)
def test_what_a_user_gets_wrong_is_one_line(tmp_path, monkeypatch, capsys, arguments, reason):
    monkeypatch.chdir(tmp_path)
    write_jsonl(tmp_path / "good.jsonl", [{"text": sentence} for sentence in SENTENCES])
    write_jsonl(tmp_path / "bad.jsonl", [{"text": "a"}, {"conversation": 1}])
    for folder, content in {"damaged": '{"broken\n', "other": '{"model": 3}'}.items():
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "tokenizer.json").write_text(content)
    usual = ("--data_path", "good.jsonl", "--out_dir", "out", "--vocab_size", "300")

    call_script("scripts/train_tokenizer.py", *usual, *arguments, exit_code=2)

    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ")
    assert reason in error
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bad.jsonl", "damaged", "good.jsonl", "other"]


@pytest.mark.parametrize(
    ("record", "texts"),
    [
        ({"text": "a"}, ["a"]),
        ({"conversations": CHATS[0]}, ["你好, world", "Hi 🙂"]),
        (
            {"chosen": CHATS[0], "rejected": [CHATS[0][0], {"role": "assistant", "content": "a"}]},
            ["你好, world", "Hi 🙂", "你好, world", "a"],
        ),
        ({"prompt": "q", "chosen": "a", "rejected": "b", "system": "s"}, ["s", "q", "a", "s", "q", "b"]),
        ({"image": "a.jpg", "conversations": [{"content": "<image>"}, CHATS[0][1]]}, ["<image>", "Hi 🙂"]),
    ],
)
def test_every_format_of_the_project_gives_its_texts(record, texts):
    assert stream_texts(record, Counter()) == texts


@pytest.mark.parametrize("record", [{}, {"text": 3}, {"conversations": 5}, {"chosen": [3], "rejected": []}])
def test_a_record_of_no_format_is_bad(record):
    with pytest.raises(BadRecord):
        stream_texts(record, Counter())


def test_a_tenth_is_kept_aside_whatever_file_a_text_is_in():
    texts = [f"text {n}" for n in range(20_000)]
    kept = [is_held_out_text(text, 0.1) for text in texts]

    assert 0.09 < sum(kept) / len(kept) < 0.11
    assert kept == [is_held_out_text(text, 0.1) for text in texts]
    assert not any(is_held_out_text(text, 0) for text in texts[:100])


def test_text_is_classed_by_its_characters(tmp_path):
    assert detect_kind(tmp_path / "a.jsonl", "你好，world。再见") == "Chinese"
    assert detect_kind(tmp_path / "lora_medical.jsonl", "头疼怎么办") == "Chinese medical"
    assert detect_kind(tmp_path / "lora_medical.jsonl", "headache") == "English"
    assert detect_kind(tmp_path / "a.jsonl", "naïve") is None


# ----------------------------------------------------------------------------------------------------- verify


def test_verify_passes_good_ones(tiny_tokenizer):
    verify(tiny_tokenizer)
    verify(load_tokenizer(SHIPPED_TOKENIZER))


def broken_ids():
    return train_tokenizer(["<s>", "<unk>", "</s>"]), "the ids of <unk>, <s>, </s> are [1, 0, 2]"


def broken_bytes():
    tokenizer = train_tokenizer(["<unk>", "<s>", "</s>"])
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    vocabulary, byte = state["model"]["vocab"], "\u0122"  # the byte 0x80 in GPT-2's alphabet
    vocabulary["spelledinletters"] = vocabulary.pop(byte)
    state["model"]["merges"] = []
    tokenizer._tokenizer = Tokenizer.from_str(json.dumps(state))
    return tokenizer, "1 of the 256 bytes have no entry, for example b'\\x80'"


def broken_alphabet():
    tokenizer = train_tokenizer(["<unk>", "<s>", "</s>"])
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    state["model"]["vocab"]["▁word"] = len(state["model"]["vocab"])
    tokenizer._tokenizer = Tokenizer.from_str(json.dumps(state))
    return tokenizer, "is not from a byte-level BPE"


def broken_round_trip():
    tokenizer = train_tokenizer(["<unk>", "<s>", "</s>"])
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    return tokenizer, "the round trip of"


def broken_template():
    tokenizer = train_tokenizer(["<unk>", "<s>", "</s>"])
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    return tokenizer, "its chat template renders a chat differently"


@pytest.mark.parametrize("breaking", [broken_ids, broken_bytes, broken_alphabet, broken_round_trip, broken_template])
def test_verify_names_what_does_not_hold(breaking):
    tokenizer, reason = breaking()
    with pytest.raises(UserError) as error:
        verify(tokenizer)
    assert reason in str(error.value)


def test_no_check_is_an_assert_that_python_o_leaves_out():
    source = (ROOT / "scripts" / "train_tokenizer.py").read_text(encoding="utf-8")
    assert not [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Assert)]


# ------------------------------------------------------------------------------------------- the shipped tokenizer


@pytest.fixture(scope="module")
def shipped():
    return load_tokenizer(SHIPPED_TOKENIZER)


def test_the_shipped_tokenizer_has_6400_entries_laid_out_as_the_design_says(shipped):
    assert len(shipped) == 6400
    assert shipped.convert_tokens_to_ids(["<unk>", "<s>", "</s>"]) == [0, 1, 2]
    assert (shipped.pad_token_id, shipped.bos_token_id, shipped.eos_token_id) == (0, 1, 2)
    added = {token.content: token.special for token in shipped.added_tokens_decoder.values()}
    tags = dict.fromkeys(["<think>", "</think>", "<answer>", "</answer>", "<image>"], False)
    assert added == dict.fromkeys(["<unk>", "<s>", "</s>"], True) | tags


def test_every_single_byte_has_a_token_and_round_trips(shipped):
    pieces = token_bytes(shipped)
    ids = {piece: i for i, piece in enumerate(pieces)}
    for byte in range(256):  # 0xff too, which valid UTF-8 never contains
        decoder = StreamDecoder(pieces)
        text = decoder.push(ids[bytes([byte])]) + decoder.flush()
        assert text == (chr(byte) if byte < 0x80 else "\ufffd")
    # and text without merges is encoded byte by byte with them
    decoder = StreamDecoder(pieces)
    assert "".join(decoder.push(ids[bytes([byte])]) for byte in "龘𠮷👩‍👩‍👧‍👦é".encode()) == "龘𠮷👩‍👩‍👧‍👦é"


@pytest.mark.parametrize("text", [*PROBES, "".join(map(chr, range(0x250))), "\U0010ffff\ue000\u2028", "<s> </s> <unk>"])
def test_text_round_trips(shipped, text):
    ids = shipped.encode(text, add_special_tokens=False)
    assert shipped.decode(ids) == text


def test_the_shipped_tokenizer_packs_text_kept_aside_as_well_as_the_references(shared, capsys):
    paths = sorted((shared / "data").glob("*.jsonl"))
    call_script("scripts/train_tokenizer.py", "--only_measure", "--data_path", *paths)

    printed = capsys.readouterr().out
    figures = {line[:16].strip(): float(line[16:].split()[0]) for line in printed.splitlines()[1:]}
    with capsys.disabled():
        print(f"\n{printed}", end="")
    assert figures["Chinese"] >= 1.268
    assert figures["English"] >= 2.661
    assert figures["Chinese medical"] >= 1.063


# --------------------------------------------------------------------------------------------------- small helpers


@pytest.mark.parametrize(("share", "kept"), [(0.0, False), (0.791, False), (0.792, True), (1.0, True)])
def test_the_hash_of_a_text_says_on_which_side_it_is(share, kept):
    """The SHA-256 of "a" begins with ca978112, which is 0.79138 of 2^32."""
    assert is_held_out_text("a", share) is kept


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("水水水aaaaaaa", None),  # three tenths at most
        ("水水水水aaaaaa", "Chinese"),
        ("\u4e00", "Chinese"),
        ("\u9fff", "Chinese"),
        ("\u4dff", None),
        ("\ua000", None),
        ("", "English"),
    ],
)
def test_where_a_kind_of_text_begins(tmp_path, text, kind):
    assert detect_kind(tmp_path / "a.jsonl", text) == kind


def test_characters_per_token_by_hand(tmp_path):
    class Halves:
        def encode(self, text, add_special_tokens):
            assert not add_special_tokens
            return text[::2]

    texts = [
        ("a.jsonl", "abcd"),
        ("a.jsonl", "abc"),
        ("medical.jsonl", "水水水"),
        ("a.jsonl", "naïve"),
        ("a.jsonl", "水"),
    ]
    found = characters_per_token(Halves(), ((tmp_path / name, text) for name, text in texts))
    assert list(found.items()) == [("Chinese", 1.0), ("Chinese medical", 1.5), ("English", 7 / 4)]


def test_every_text_is_on_one_side_and_ignored_keys_are_told_with_the_one_kept_aside(data, capsys):
    paths = [data / "texts.jsonl", data / "pairs.jsonl"]
    training = list(texts_in(paths, 0.5, kept_aside=False))
    assert capsys.readouterr().err == ""
    kept = list(texts_in(paths, 0.5, kept_aside=True))
    assert capsys.readouterr().err == f"{data / 'pairs.jsonl'}: ignored keys: id 1\n"
    assert len(training) + len(kept) == 300 + 6
    assert not {text for _, text in training} & {text for _, text in kept}
    assert {path for path, _ in training + kept} == set(paths)


def test_what_is_measured_was_not_trained_on(tmp_path, monkeypatch):
    data = write_jsonl(tmp_path / "a.jsonl", [{"text": f"text {n}"} for n in range(300)])
    trained, measured = [], []
    monkeypatch.setattr(script, "train", lambda texts, vocab_size: trained.extend(texts))
    monkeypatch.setattr(script, "save", lambda tokenizer, folder: None)
    monkeypatch.setattr(script, "load_tokenizer", lambda folder: [])
    monkeypatch.setattr(script, "verify", lambda tokenizer: None)
    monkeypatch.setattr(
        script, "characters_per_token", lambda tokenizer, texts: measured.extend(text for _, text in texts) or {}
    )
    call_script("scripts/train_tokenizer.py", "--data_path", data, "--out_dir", tmp_path / "out", "--holdout", "0.2")
    assert len({*trained, *measured}) == len(trained) + len(measured) == 300
    assert 0.1 < len(measured) / 300 < 0.3


def test_a_saved_tokenizer_says_how_long_texts_may_be_and_cleans_nothing_up(tmp_path):
    save(train(iter(SENTENCES), 300), tmp_path / "new")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "new", local_files_only=True)
    assert (tokenizer.model_max_length, tokenizer.clean_up_tokenization_spaces) == (8192, False)
    assert tokenizer.convert_tokens_to_ids(["<think>", "</think>", "<answer>", "</answer>", "<image>"]) == [
        *range(len(tokenizer) - 5, len(tokenizer))
    ]


@pytest.mark.parametrize(("share", "taken"), [("-0.01", False), ("0", True), ("0.999", True), ("1", False)])
def test_the_share_that_is_kept_aside(tmp_path, capsys, share, taken):
    """With a vocabulary that is too small, which is the next check."""
    data = write_jsonl(tmp_path / "a.jsonl", [{"text": "a"}])
    flags = ("--data_path", data, "--out_dir", tmp_path / "out", "--vocab_size", "263", f"--holdout={share}")
    call_script("scripts/train_tokenizer.py", *flags, exit_code=2)
    assert ("--vocab_size 263" if taken else "--holdout must be") in capsys.readouterr().err


@pytest.mark.parametrize("record", [{"chosen": CHATS[0]}, {"rejected": CHATS[0]}])
def test_half_a_pair_is_none(record):
    with pytest.raises(BadRecord, match=r'^neither "text" nor "conversations" nor "chosen" and "rejected"'):
        stream_texts(record, Counter())
