"""Byte-level BPE with tiktoken: the same ids as the tokenizers library, several times faster.

tiktoken merges in the same way but has no list of merges: it joins two neighbours if their bytes are an entry, the
entry of lowest rank first. This gives the same ids if every merge makes a new entry from earlier entries, and if the
bytes of each entry, encoded alone, become that entry. All of this is checked here, as is everything else that affects
the ids; a tokenizer of another kind gets no `FastBPE`.

The two libraries split text by the same pattern, but may know different versions of Unicode. So a text with a character
that this Python does not know, or with a surrogate, is left to the tokenizers library.
"""

import itertools
import json
import os
import sys
import unicodedata
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache

import numpy as np
from tokenizers import Tokenizer

from model.tokenizer import BYTE_OF

PART_END, TEXT_END = "\ufdd0", "\ufdd1"  # noncharacters, which Unicode will never assign: no text has them
LONG_CHARS = 1 << 16  # of text in one call, from which on the start of tiktoken pays
SHARE_CHARS = 1 << 15  # of text for a thread, at least
BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
SINGLE_DIGITS = {"type": "Digits", "individual_digits": True}
# The pattern of GPT-2 (Radford et al. 2019), the branches that look ahead apart: only these need a backtracking matcher
WORDS = r"(?:'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+|%s| ?[^\s\p{L}\p{N}]+)%s|\s+(?!\S)|\s+"
PATTERNS = (
    ([BYTE_LEVEL], WORDS % (r" ?\p{N}+", "")),
    ([SINGLE_DIGITS, BYTE_LEVEL], WORDS % (r"\p{N}", r"|\s+(?=\p{N})")),  # white space before a digit is not split
)
PROBES = (
    "Hello, world!  It's 12 + 30 = 42, isn't it?\n\n\tI'll say: they'Ve \u00bd of 1234567890.   ",
    "你好，世界！ 今天 2026年11月28日，  天气\u3000很好。\r\n龘靐齉爩 𠮷 㐀 １２３ Ⅷ ②",
    "👩\u200d👩\u200d👧\u200d👦 🇨🇳 😀 \u00a0\u2003\u2028 e\u0301 हिन्दी ภาษาไทย العربية 한국어 ñ\u0303",
    bytes(range(256)).decode("latin-1"),
)


class FastBPE:
    """Encodes many texts at once, on all cores.

    Args:
        tokenizer: as in `fast_bpe`, which makes this if possible.

    Raises:
        ValueError: tiktoken cannot reproduce its ids.
    """

    def __init__(self, tokenizer: Tokenizer):
        import tiktoken  # here: most of what renders text never needs it

        state = json.loads(tokenizer.to_str())
        added = {token["content"]: token["id"] for token in state["added_tokens"]}
        _check_added(state["added_tokens"])
        merged = _entries(state["model"], tokenizer)
        ids = [*merged.values(), *added.values()]
        special = {content: len(merged) + n for n, content in enumerate([*added, PART_END, TEXT_END])}
        ranks = {spelled: rank for rank, spelled in enumerate(merged)}
        self._encoding = tiktoken.Encoding("", pat_str=_pattern(state), mergeable_ranks=ranks, special_tokens=special)
        self._special = set(special)
        self._ids = np.array([*ids, -1, -2], dtype=np.int64)  # our id for each of tiktoken's
        self._exact = tokenizer
        probes = [[probe] for probe in (*PROBES, *(f"a {content}{content} z" for content in added), _every_number())]
        if not all(map(np.array_equal, self.encode(probes), _exact_ids(tokenizer, probes))):
            raise ValueError("tiktoken gives different ids")

    def encode(self, texts: Sequence[list[str]]) -> list[np.ndarray]:
        """The ids of each text, int64 (n,), whose parts are encoded separately: those of the tokenizers library.

        Raises:
            TypeError: a text holds a lone surrogate.
        """
        joined = [PART_END.join(parts) for parts in texts]
        doubtful = _doubtful(texts)
        for number in doubtful:
            joined[number] = ""
        ids = [found for share in self._in_threads(_shares(joined)) for found in self._split(share)]
        for number, exact in zip(doubtful, _exact_ids(self._exact, [texts[n] for n in doubtful]), strict=True):
            ids[number] = exact
        return ids

    def _in_threads(self, shares: list[str]) -> list[np.ndarray]:
        if len(shares) == 1:
            return [self._encode(shares[0])]
        with ThreadPoolExecutor(min(len(shares), os.cpu_count() or 1)) as threads:
            return list(threads.map(self._encode, shares))

    def _encode(self, text: str) -> np.ndarray:
        return self._ids[self._encoding.encode_to_numpy(text, allowed_special=self._special, disallowed_special=())]

    def _split(self, ids: np.ndarray) -> list[np.ndarray]:
        """Split ids into those of each text; the markers that end texts and parts are dropped."""
        ids = ids[ids != -1]
        ends = np.flatnonzero(ids == -2).tolist()
        return [ids[start:end] for start, end in zip([0, *(end + 1 for end in ends)], ends, strict=False)]


def encode_parts(tokenizer: Tokenizer, texts: list[list[str]]) -> list[np.ndarray]:
    """The ids of each text, int64 (n,), whose parts are encoded separately; by tiktoken if it can and it is faster.

    Args:
        tokenizer: without truncation and padding.

    Raises:
        TypeError: a text holds a lone surrogate.
    """
    worth_it = sum(len(part) for parts in texts for part in parts) >= LONG_CHARS
    fast = fast_bpe(tokenizer) if worth_it else None
    return fast.encode(texts) if fast else _exact_ids(tokenizer, texts)


def fast_bpe(tokenizer: Tokenizer) -> FastBPE | None:
    """A `FastBPE` with a tokenizer's ids, None if it is not possible; made once, in a fifth of a second."""
    if tokenizer.encode_special_tokens:  # it leaves tags in a text as text
        return None
    return _make(tokenizer, repr(tokenizer))


@lru_cache(2)
def _make(tokenizer: Tokenizer, state: str) -> FastBPE | None:
    """`state` is part of the cache key, because a tokenizer can be changed in place."""
    try:
        return FastBPE(tokenizer)
    except ValueError:
        return None


def _check_added(tokens: list[dict]) -> None:
    """Require that added tokens match by their plain text alone and that none is a prefix of another."""
    contents = sorted(token["content"] for token in tokens)
    if any(token[name] for token in tokens for name in ("single_word", "lstrip", "rstrip", "normalized")):
        raise ValueError("an added token also strips the text around it")
    if any(other.startswith(content) for content, other in itertools.pairwise(contents)):
        raise ValueError("an added token is a prefix of another")


def _pattern(state: dict) -> str:
    """The tiktoken pattern equivalent to the pre-tokenizer of a tokenizer.json."""
    if state["normalizer"] is not None or state["pre_tokenizer"] is None:
        raise ValueError("it normalises, or does not split")
    steps = state["pre_tokenizer"].get("pretokenizers", [state["pre_tokenizer"]])
    steps = [{name: value for name, value in step.items() if name != "trim_offsets"} for step in steps]
    for known, pattern in PATTERNS:
        if steps == known:
            return pattern
    raise ValueError("it splits text differently")


def _entries(model: dict, tokenizer: Tokenizer) -> dict[bytes, int]:
    """Ids by the bytes of their tokens: all single bytes, then the result of each merge, in the order of the merges."""
    plain = {"type": "BPE", "dropout": None, "byte_fallback": False, "ignore_merges": False}
    if any(model[name] != value for name, value in plain.items()):
        raise ValueError("it is another kind of BPE")
    if model["continuing_subword_prefix"] or model["end_of_word_suffix"]:
        raise ValueError("it marks where words end")
    vocabulary = model["vocab"]
    made = {char: vocabulary[char] for char in BYTE_OF if char in vocabulary}
    if len(made) < len(BYTE_OF):
        raise ValueError("it lacks bytes")
    for left, right in model["merges"]:
        if left not in made or right not in made or left + right in made:
            raise ValueError("its merges are not in training order")
        if [token.id for token in tokenizer.model.tokenize(left + right)] != [vocabulary[left + right]]:
            raise ValueError("an entry is not what its own bytes encode to")
        made[left + right] = vocabulary[left + right]
    return {bytes(BYTE_OF[char] for char in token): token_id for token, token_id in made.items()}


def _doubtful(texts: Sequence[list[str]]) -> list[int]:
    """Indices of the texts with a code point that this Python's Unicode does not assign, or with a surrogate."""
    codes = "".join(part for parts in texts for part in parts).encode("utf-32-le", "surrogatepass")
    there = np.zeros(sys.maxunicode + 1, dtype=bool)
    there[np.frombuffer(codes, np.uint32)] = True
    odd = {char for char in map(chr, np.flatnonzero(there)) if unicodedata.category(char) in ("Cn", "Cs")}
    return [number for number, parts in enumerate(texts) if not odd.isdisjoint("".join(parts))] if odd else []


@lru_cache(1)
def _every_number() -> str:
    """Every character that Python classifies as a number, next to letters, white space and itself."""
    numbers = [chr(code) for code in range(0x20000) if unicodedata.category(chr(code))[0] == "N"]
    return "".join(f"a{number} {number}  {number}!" for number in numbers)


def _exact_ids(tokenizer: Tokenizer, texts: list[list[str]]) -> list[np.ndarray]:
    encodings = tokenizer.encode_batch_fast(texts, is_pretokenized=True, add_special_tokens=False)
    return [np.array(encoding.ids, dtype=np.int64) for encoding in encodings]


def _shares(texts: list[str]) -> list[str]:
    """The texts joined, each ended by TEXT_END, in order and in shares of about equal length, one for each thread."""
    wanted = max(SHARE_CHARS, sum(map(len, texts)) // (os.cpu_count() or 1) + 1)
    shares, share, chars = [], [], 0
    for text in texts:
        share.append(text)
        chars += len(text)
        if chars >= wanted:
            shares.append(TEXT_END.join([*share, ""]))
            share, chars = [], 0
    if share or not shares:
        shares.append(TEXT_END.join([*share, ""]))
    return shares
