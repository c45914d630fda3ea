"""tiktoken instead of the tokenizers library: the same ids for every text, or it is not used."""

import hashlib
import json
import random
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from tokenizers import AddedToken, Tokenizer, normalizers, pre_tokenizers

from model import fast_bpe as module
from model.chat import render_chats, render_text
from model.fast_bpe import FastBPE, encode_parts, fast_bpe
from tests.conftest import SENTENCES, TAGS
from trainer.weights import SHIPPED_TOKENIZER

KINDS = ("shipped", "tiny", "published")


@pytest.fixture(scope="module", params=KINDS)
def both(request) -> tuple[Tokenizer, FastBPE]:
    """A tokenizer of the tokenizers library, and its FastBPE."""
    if request.param == "tiny":
        tokenizer = copy_of(request.getfixturevalue("tiny_tokenizer").backend_tokenizer)
    elif request.param == "published":
        tokenizer = Tokenizer.from_file(
            str(request.getfixturevalue("shared") / "fixtures" / "minimind3_tokenizer" / "tokenizer.json")
        )
    else:
        tokenizer = shipped()
    return tokenizer, fast_bpe(tokenizer)


def shipped() -> Tokenizer:
    return Tokenizer.from_file(str(SHIPPED_TOKENIZER / "tokenizer.json"))


def copy_of(tokenizer: Tokenizer, **changes) -> Tokenizer:
    """A copy with some parts of its tokenizer.json replaced."""
    return Tokenizer.from_str(json.dumps(json.loads(tokenizer.to_str()) | changes))


def check(tokenizer: Tokenizer, fast: FastBPE, texts: list[str]) -> None:
    """Check that both give the same ids for each text."""
    encodings = tokenizer.encode_batch_fast([[text] for text in texts], is_pretokenized=True, add_special_tokens=False)
    found = fast.encode([[text] for text in texts])
    for text, ids, encoding in zip(texts, found, encodings, strict=True):
        assert ids.tolist() == encoding.ids, repr(text[:200])


def strings_in(value: object) -> list[str]:
    if isinstance(value, str):
        return [value]
    values = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return [text for inner in values for text in strings_in(inner)]


def texts_in(path: Path) -> list[str]:
    with open(path, encoding="utf-8") as lines:
        return [text for line in lines for text in strings_in(json.loads(line))]


def hash_of_ids(encode, texts: list[str]) -> str:
    found = hashlib.sha256()
    for begin in range(0, len(texts), 5000):
        for ids in encode([[text] for text in texts[begin : begin + 5000]]):
            found.update(np.array([*ids, -1], dtype=np.int32).tobytes())
    return found.hexdigest()[:16]


# Hashes of the tokenizers library's ids for each file; `_exact_ids` instead of `encode` in the test below renews them
HASHES = {
    "dpo.jsonl": "376c62e6dec5b197",
    "lora_medical.jsonl": "505f62b5f0005322",
    "pretrain_hq.jsonl": "1e1b7ee62552746f",
    "r1_mix_1024.jsonl": "58d6918726ef0d11",
    "sft_mini_512.jsonl": "89c2ea473d24a422",
}


def test_all_real_text_has_the_same_ids(shared):
    """Some texts are encoded by both libraries, all are compared with a stored hash of the tokenizers library's ids."""
    tokenizer = shipped()
    fast = fast_bpe(tokenizer)
    for path in (shared / "data").rglob("*.csv"):
        check(tokenizer, fast, path.read_text(encoding="utf-8").splitlines())
    texts = {path.name: texts_in(path) for path in (shared / "data").glob("*.jsonl")}
    for some in texts.values():
        check(tokenizer, fast, some[::40])
    found = {name: hash_of_ids(fast.encode, some) for name, some in texts.items()}
    assert found == HASHES


def test_random_text_has_the_same_ids(both):
    tokenizer, fast = both
    draw = random.Random(0)
    words = ["'s", "'ll", "'", "'LL", " ", "  ", "\t", "\r\n", "\n\n", "\u3000", "\u00a0", "a", "Zé", "中文", "。"]
    words += ["7", "１", "½", "Ⅷ", "²", "😀", "\u200d", "\u0301", "<", "s>", "<s", "</", ">", "\x00", "!?", *SENTENCES]
    words += [token.content for token in tokenizer.get_added_tokens_decoder().values()]
    texts = ["".join(draw.choices(words, k=draw.randrange(40))) for _ in range(2000)]
    words += ["\u0378", "\ufdd0", "\ufdd1", "\U00011de0"]  # unassigned, or of a newer Unicode: not for tiktoken
    texts += ["".join(draw.choices(words, k=draw.randrange(40))) for _ in range(500)]
    planes = [(0x20, 0x7F), (0x80, 0x600), (0x600, 0x3000), (0x3000, 0xD800), (0xE000, 0x20000), (0x20000, 0x110000)]
    for n in range(1000):
        span = draw.choice(planes)
        chars = [chr(draw.randrange(*span)) for _ in range(draw.randrange(30))]
        texts.append("".join(char for char in chars if n % 2 or unicodedata.category(char) != "Cn"))
    for _ in range(500):
        anything = draw.randbytes(draw.randrange(60))
        texts += [anything.decode("utf-8", errors="replace"), anything.decode("latin-1")]
    check(tokenizer, fast, texts)


@pytest.mark.parametrize("both", KINDS[:2], indirect=True)  # one for each kind of pre-tokenizer
def test_every_character_splits_the_text_alike(both):
    """All characters that this Python knows, except the middle of large blocks, where all are letters."""
    tokenizer, fast = both
    large = [range(0x3500, 0x4D00), range(0x4F00, 0x9F00), range(0xAD00, 0xD700), range(0x17100, 0x18C00)]
    codes = [
        code
        for code in [*range(0x20000), *range(0x20000, 0x110000, 997)]
        if unicodedata.category(chr(code)) not in ("Cn", "Cs", "Co") and not any(code in block for block in large)
    ]
    random.Random(0).shuffle(codes)
    contexts = [f" {chr(code)}1  {chr(code)}!" for code in codes]
    check(tokenizer, fast, ["".join(contexts[n : n + 50]) for n in range(0, len(contexts), 50)])


def test_long_runs_of_anything_have_the_same_ids(both):
    tokenizer, fast = both
    draw = random.Random(0)
    runs = [char * n for char in (" ", "\n", "a", "ab", "中", "7", "'", "=-") for n in (99, 130, 600, 30_000)]
    runs += [run + end for run in (" " * 65_535, "\t\n" * 30_000) for end in ("x", "7", "中", "")]
    runs += ["".join(draw.choices("etaoinshrdlu", k=n)) for n in (130, 700, 5000)]
    runs += ["".join(chr(draw.randrange(0x4E00, 0x4F00)) for _ in range(n)) for n in (60, 300, 2000)]
    check(tokenizer, fast, runs)


def test_parts_are_encoded_apart(both):
    tokenizer, fast = both
    texts = [["the", "re"], [], [""], ["<", "s>"], ["", "a", ""], [" ", " ", "b"], ["中\u0378", "文"], ["end"]]
    found = fast.encode(texts)
    expected = tokenizer.encode_batch_fast(texts, is_pretokenized=True, add_special_tokens=False)
    assert [ids.tolist() for ids in found] == [encoding.ids for encoding in expected]


@pytest.mark.parametrize("cores", [1, 2, 5])
def test_however_many_threads_share_them_texts_keep_their_order(both, monkeypatch, cores):
    tokenizer, fast = both
    monkeypatch.setattr(module, "SHARE_CHARS", 100)
    monkeypatch.setattr(module.os, "cpu_count", lambda: cores)
    check(tokenizer, fast, [f"{n} {SENTENCES[n % 8]}"[: n % 50] for n in range(200)])
    assert fast.encode([]) == []


def test_entries_may_lie_in_any_order(both):
    """The order of the ids need not be that of the merges."""
    tokenizer, _ = both
    state = json.loads(tokenizer.to_str())
    vocabulary = state["model"]["vocab"]
    ids = list(vocabulary.values())
    random.Random(0).shuffle(ids)
    shuffled = dict(zip(vocabulary, ids, strict=True))
    added = [token | {"id": shuffled.get(token["content"], token["id"])} for token in state["added_tokens"]]
    other = copy_of(tokenizer, added_tokens=added, model=state["model"] | {"vocab": shuffled})
    check(other, fast_bpe(other), [*SENTENCES, *TAGS])


def by_hand(*merges: str, **model) -> Tokenizer:
    """A tokenizer with these merges, each given as "left right"."""
    alphabet = sorted(module.BYTE_OF)
    made = list(dict.fromkeys("".join(merge.split()) for merge in merges))
    vocabulary = {token: n for n, token in enumerate([*alphabet, *made])}
    backend = shipped()
    plain = json.loads(backend.to_str())["model"] | {"vocab": vocabulary, "merges": [merge.split() for merge in merges]}
    return copy_of(backend, added_tokens=[], model=plain | model)


def test_merges_by_hand_are_taken_where_every_entry_is_what_its_bytes_become():
    good = by_hand("a b", "b c", "ab c")
    check(good, fast_bpe(good), ["abc", "ab", "bc", "aabbcc", "xbcabc"])
    never_made = by_hand("q x", "x v", "q xv")  # "qxv" becomes "qx" and "v", but tiktoken would make it one token
    assert never_made.encode("qxv").tokens == ["qx", "v"]
    assert fast_bpe(never_made) is None


@pytest.mark.parametrize(
    "other",
    [
        lambda: by_hand("a b", "b c", "ab c", "a bc"),  # one entry by two merges
        lambda: by_hand("ab c", "a b"),  # before its parts
        lambda: by_hand("a b", dropout=1e-9),
        lambda: by_hand("a b", ignore_merges=True),
        lambda: by_hand("a b", byte_fallback=True),
        lambda: changed(lambda backend: setattr(backend, "normalizer", normalizers.NFC())),
        lambda: changed(lambda backend: setattr(backend, "pre_tokenizer", pre_tokenizers.ByteLevel(True))),
        lambda: changed(lambda backend: setattr(backend, "pre_tokenizer", pre_tokenizers.Whitespace())),
        lambda: changed(lambda backend: setattr(backend, "encode_special_tokens", True)),
        lambda: changed(lambda backend: backend.add_tokens([AddedToken("<x>", lstrip=True, normalized=False)])),
        lambda: changed(lambda backend: backend.add_tokens([AddedToken("<x>", single_word=True, normalized=False)])),
        lambda: changed(lambda backend: backend.add_tokens(["<x>"])),  # matched in normalised text, by default
        lambda: changed(lambda backend: backend.add_tokens([AddedToken("<think>ing", normalized=False)])),
    ],
)
def test_a_tokenizer_of_another_kind_gets_none(other):
    assert fast_bpe(other()) is None


def changed(change) -> Tokenizer:
    tokenizer = shipped()
    change(tokenizer)
    return tokenizer


def test_one_that_gives_other_ids_is_not_used(monkeypatch):
    monkeypatch.setattr(module, "PATTERNS", [(known, r"\S+|\s+") for known, _ in module.PATTERNS])
    assert fast_bpe(shipped()) is None


def test_a_tokenizer_that_changes_is_another():
    tokenizer = shipped()
    check(tokenizer, fast_bpe(tokenizer), ["a <new> b"])
    tokenizer.add_tokens([AddedToken("<new>", normalized=False)])
    check(tokenizer, fast_bpe(tokenizer), ["a <new> b"])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    check(tokenizer, fast_bpe(tokenizer), ["a 12 b"])


def test_it_is_used_for_long_texts_alone(monkeypatch, tiny_tokenizer):
    used = []
    encode = FastBPE.encode
    monkeypatch.setattr(FastBPE, "encode", lambda self, texts: used.append(texts) or encode(self, texts))
    monkeypatch.setattr(module, "LONG_CHARS", 100)
    backend = copy_of(tiny_tokenizer.backend_tokenizer)
    fast_bpe(backend)
    used.clear()
    short, long = ["x" * 50, "y" * 49], ["x" * 50, "y" * 50]
    encode_parts(backend, [short])
    encode_parts(backend, [long])
    assert used == [[long]]


def test_rendered_texts_and_chats_are_the_same_both_ways(monkeypatch, both):
    tokenizer = pytest.importorskip("transformers").PreTrainedTokenizerFast(
        tokenizer_object=both[0], bos_token=first(both[0], 1), eos_token=first(both[0], 2)
    )
    typed = " ".join(token.content for token in tokenizer.added_tokens_decoder.values())
    texts = [*SENTENCES, typed, f"<s>{typed}</s>", "", "  "]
    chats = [[{"role": role, "content": text} for role in ("user", "assistant")] for text in texts]
    exact = render_text(tokenizer, texts), render_chats(tokenizer, chats)
    monkeypatch.setattr(module, "LONG_CHARS", 0)
    assert (render_text(tokenizer, texts), render_chats(tokenizer, chats)) == exact


def first(tokenizer: Tokenizer, token_id: int) -> str:
    return tokenizer.id_to_token(token_id)


def test_half_a_character_is_refused_as_ever(monkeypatch, tiny_tokenizer):
    monkeypatch.setattr(module, "LONG_CHARS", 0)
    with pytest.raises(ValueError, match="lone surrogate"):
        render_text(tiny_tokenizer, ["fine", "half \ud83d of one"])
