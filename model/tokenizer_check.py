"""Whether a MiniMind can be trained with a tokenizer: one check for every script that loads or trains one."""

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from model.chat import ROLES, render_chat, render_text
from model.template_chat import lays_out_thinking
from model.tokenizer import StreamDecoder, token_bytes

PROBES = (
    "",
    " ",
    "\n\n  \t",
    "Hello, world!",
    "  two  spaces",
    "龘靐齉爩 𠮷 㐀，。！",
    "👩‍👩‍👧‍👦 🇨🇳 😀",
    "def f(x):\n\treturn x ** 2  # ½",
    "1234567890",
    bytes(range(256)).decode("latin-1"),  # as characters: UTF-8 puts all lead and trail bytes to use
)
USUAL = {  # their names in other families
    "bos": ("<|im_start|>", "<|begin_of_text|>", "<|startoftext|>", "<s>", "<bos>", "[BOS]", "<|endoftext|>"),
    "eos": ("<|im_end|>", "<|eot_id|>", "<|end_of_text|>", "</s>", "<eos>", "[EOS]", "<|endoftext|>"),
}
BEGINS_OR_ENDS = {"bos": "begins", "eos": "ends"}
KINDS = {"Unigram": "Unigram, as SentencePiece's and T5's", "WordPiece": "WordPiece, as BERT's"}


def check_tokenizer(tokenizer: PreTrainedTokenizerBase) -> None:
    """Check everything that rendering, training and generation rely on.

    It must be a byte-level BPE with ids from 0 on, including bos and eos; decoding must restore every text, and no text
    that spells a control token may become one. NFC normalisation, as in Qwen's tokenizer, is allowed.

    Raises:
        ValueError: the requirement that is not met, and what to do if there is a remedy; one line.
    """
    _check_kind(tokenizer)
    ids = sorted(tokenizer.get_vocab().values())
    if ids != list(range(len(ids))):
        hole = next(place for place, token_id in enumerate(ids) if place != token_id)
        raise ValueError(
            f"its ids have a gap or a duplicate: it has {len(ids)} entries, but none of its own for {hole}"
        )
    for name in ("bos", "eos"):
        _check_delimiter(tokenizer, name)
    pieces = token_bytes(tokenizer)
    lacking = {bytes([byte]) for byte in range(256)}.difference(pieces)
    if lacking:  # then not every text has tokens
        raise ValueError(f"{len(lacking)} of the 256 bytes have no entry, for example {min(lacking)}")
    check_round_trips(tokenizer, PROBES, pieces)
    _check_chat(tokenizer, pieces)


def check_round_trips(tokenizer: PreTrainedTokenizerFast, texts: Sequence[str], pieces: list[bytes]) -> None:
    """Check that encoding and decoding restores these texts.

    Args:
        pieces: the tokenizer's `token_bytes`.

    Raises:
        ValueError: the first that does not.
    """
    for text, (_, *ids, _) in zip(texts, render_text(tokenizer, texts), strict=True):
        if (back := _spelled(ids, pieces)) != text:
            raise ValueError(
                f"the round trip of {text!r:.80} gives {back!r:.80}: its normalizer, pre-tokenizer or added tokens "
                "change the text, and a different text would be learned"
            )


def _check_kind(tokenizer: PreTrainedTokenizerBase) -> None:
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise ValueError(f"it is a {type(tokenizer).__name__}, not a tokenizer of the tokenizers library")
    backend = tokenizer.backend_tokenizer
    kind = type(backend.model).__name__
    if kind != "BPE" or "ByteLevel" not in f"{backend.pre_tokenizer} {backend.normalizer}":
        kind = "BPE of characters, as SentencePiece's and Llama 2's" if kind == "BPE" else KINDS.get(kind, kind)
        raise ValueError(
            f"it is not a byte-level BPE, which encodes any text, but a {kind}: scripts/train_tokenizer.py trains one"
        )


def _check_delimiter(tokenizer: PreTrainedTokenizerFast, name: str) -> None:
    token, token_id = getattr(tokenizer, f"{name}_token"), getattr(tokenizer, f"{name}_token_id")
    entries = tokenizer.get_vocab()
    if token is None:
        usual = next((usual for usual in USUAL[name] if usual in entries), USUAL[name][0])
        raise ValueError(
            f"it has no {name} token, which {BEGINS_OR_ENDS[name]} every text and every turn of a chat: "
            f'write "{name}_token": "{usual}" into its tokenizer_config.json'
        )
    if entries.get(token) != token_id or not tokenizer.added_tokens_decoder[token_id].special:
        raise ValueError(f"its {name} token {token!r} is not a special entry of its own")


def _check_chat(tokenizer: PreTrainedTokenizerFast, pieces: list[bytes]) -> None:
    """Check that the layout holds, and typed text stays text, in turns whose content spells every added token."""
    added = tokenizer.added_tokens_decoder
    typed = " ".join(["a", *(token.content for token in added.values()), "z"])
    chat = [{"role": role, "content": typed} for role in ROLES]
    ids, _ = render_chat(tokenizer, chat)
    control = [i for i in ids if i in added and added[i].special]
    if control != [tokenizer.bos_token_id, tokenizer.eos_token_id] * len(chat):
        strange = next((i for i in control if i not in (tokenizer.bos_token_id, tokenizer.eos_token_id)), control[0])
        raise ValueError(
            f"text that spells its token {added[strange].content!r} is encoded as that token: user text could not be "
            "distinguished from a control token"
        )
    shown = {tokenizer.bos_token_id: tokenizer.bos_token, tokenizer.eos_token_id: tokenizer.eos_token}
    pieces = [shown[i].encode() if i in shown else piece for i, piece in enumerate(pieces)]
    layout = "".join(f"{tokenizer.bos_token}{role}\n{typed}{tokenizer.eos_token}\n" for role in ROLES)
    if lays_out_thinking(tokenizer):
        layout = tokenizer.apply_chat_template(chat, tokenize=False)
    if (back := _spelled(ids, pieces)) != layout:
        place = next(i for i, (a, b) in enumerate(zip(back + "\0", layout + "\0", strict=False)) if a != b)
        raise ValueError(
            f"a chat does not survive the round trip through its tokens: {back[place : place + 20]!r} instead of "
            f"{layout[place : place + 20]!r}"
        )


def _spelled(ids: list[int], pieces: list[bytes]) -> str:
    decoder = StreamDecoder(pieces)
    return "".join(map(decoder.push, ids)) + decoder.flush()
