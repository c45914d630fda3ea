"""The bytes of a byte-level BPE's ids, a tokenizer's fingerprint, and streaming text."""

import codecs
import hashlib
import json
from collections.abc import Sequence

from transformers import PreTrainedTokenizerFast


def _byte_alphabet() -> dict[str, int]:
    """The printable character that stands for each byte inside a byte-level BPE's vocabulary, as {character: byte}.

    GPT-2's alphabet (Radford et al., "Language Models are Unsupervised Multitask Learners", 2019): printable Latin-1
    characters stand for their own byte, the other 68 bytes take the code points from 256 on, in order.
    """
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}


BYTE_OF = _byte_alphabet()


def token_bytes(tokenizer: PreTrainedTokenizerFast) -> list[bytes]:
    """The bytes each id stands for.

    Returns:
        one bytes object per id, `len(tokenizer)` of them: b"" for special tokens (`<unk>`, `<s>`, `</s>`), which are
        not text, and the text itself in UTF-8 for the other added tokens (`<think>`, …).

    Raises:
        ValueError: the vocabulary is not that of a byte-level BPE.
    """
    added = tokenizer.added_tokens_decoder
    table = []
    for token_id, token in enumerate(tokenizer.convert_ids_to_tokens(range(len(tokenizer)))):
        if token_id in added:
            table.append(b"" if added[token_id].special else token.encode())
        elif token is None or not BYTE_OF.keys() >= set(token):
            raise ValueError(
                f"token {token_id} ({token!r}) is not from a byte-level BPE: this tokenizer cannot be used"
            )
        else:
            table.append(bytes(BYTE_OF[char] for char in token))
    return table


def special_ids(tokenizer: PreTrainedTokenizerFast) -> dict[str, int]:
    """bos_token_id, eos_token_id and pad_token_id, for a model's config.

    A tokenizer without a pad token pads with unk or eos: padding is known by position, and never a target.
    """
    pad = next(i for i in (tokenizer.pad_token_id, tokenizer.unk_token_id, tokenizer.eos_token_id) if i is not None)
    return {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": pad}


def tokenizer_hash(tokenizer: PreTrainedTokenizerFast) -> str:
    """16 hex digits that are equal for two tokenizers when every text gets the same ids from both (SHA-256, shortened).

    Covers the added tokens, normalizer, pre-tokenizer, vocabulary and merges, and nothing that a call on the tokenizer
    may change, such as its truncation and padding.
    """
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    deciding = {key: state[key] for key in ("added_tokens", "normalizer", "pre_tokenizer", "model")}
    return hashlib.sha256(json.dumps(deciding, sort_keys=True).encode()).hexdigest()[:16]


class StreamDecoder:
    """Turns ids into text as they are generated, never yielding half a UTF-8 character.

    A Chinese character or an emoji often spans several tokens: its bytes are held back until it is complete. Bytes
    that are not UTF-8 become U+FFFD. Special tokens, and ids that the tokenizer does not have, give no text.

    Args:
        tokenizer: the tokenizer of the ids, or its `token_bytes`, which spares a server computing it per request.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast | Sequence[bytes]):
        self._bytes = token_bytes(tokenizer) if isinstance(tokenizer, PreTrainedTokenizerFast) else tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token_id: int) -> str:
        """The text that this id completes; often empty."""
        return self._decoder.decode(self._bytes[token_id] if token_id < len(self._bytes) else b"")

    def flush(self) -> str:
        """The rest at the end: empty, or U+FFFD for an incomplete character."""
        return self._decoder.decode(b"", final=True)
