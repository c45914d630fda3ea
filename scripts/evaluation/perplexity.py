"""How well a model predicts a text, measured independently of its tokenizer."""

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from dataset.jsonl import BadRecord, JsonlReader
from trainer.errors import UserError

if TYPE_CHECKING:  # scripts/report.py predicts texts without the harness
    from lm_eval.api.model import TemplateLM

TEXTS_AT_ONCE = 64


class Predicted(NamedTuple):
    """The tokens, UTF-8 bytes, and negative log-likelihood in nats of some texts."""

    texts: int
    tokens: int
    bytes: int
    nats: float

    @property
    def bits_per_byte(self) -> float:
        """Bits per byte, which can compare models with different tokenizers, unlike nats per token."""
        return self.nats / math.log(2) / self.bytes

    @property
    def nats_per_token(self) -> float:
        return self.nats / self.tokens


def windows(ids: Sequence[int], begin: int, window: int, stride: int) -> Iterator[tuple[list[int], list[int]]]:
    """Split a text into (context, predicted) pairs so that each token is predicted once.

    Args:
        ids: the text's tokens.
        begin: the token before the first, `<s>`.
        window: tokens that a model processes at once.
        stride: tokens that each window after the first predicts; the others are their context, so that only the text's
            beginning has less than `window - stride` tokens before it.
    """
    whole, at = [begin, *ids], 1
    while at < len(whole):
        end = min(len(whole), at + (window if at == 1 else stride))
        yield whole[max(0, end - 1 - window) : at], whole[at:end]
        at = end


def perplexity(lm: "TemplateLM", texts: Iterable[str], window: int) -> Predicted:
    """Predict each text from its beginning on, in windows that overlap by half.

    Args:
        lm: any model of the harness whose texts are tokens.
        window: in tokens; at most the model's context.

    Raises:
        UserError: there is no text.
    """

    def encode(some: list[str]) -> list[list[int]]:
        return [lm.tok_encode(text, add_special_tokens=False) for text in some]

    def log_probs(parts: list[tuple[list[int], list[int]]]) -> Iterator[float]:
        for logprob, _ in lm._loglikelihood_tokens([(None, *part) for part in parts], disable_tqdm=True):
            yield logprob

    found = predict_texts(texts, min(window, lm.max_length), lm.prefix_token_id, encode, log_probs)
    if not found.bytes:
        raise UserError("--ppl: there is no text to score")
    return found


def predict_texts(
    texts: Iterable[str],
    window: int,
    begin: int,
    encode: Callable[[list[str]], list[list[int]]],
    log_probs: Callable[[list[tuple[list[int], list[int]]]], Iterable[float]],
) -> Predicted:
    """Predict each text from its beginning on, in windows that overlap by half.

    Args:
        window, begin: as in `windows`.
        encode: texts -> the tokens of each, without special ones.
        log_probs: (context, predicted) of some windows -> the log-likelihood of each, in nats, in any order.
    """
    total = Predicted(0, 0, 0, 0.0)
    texts = iter(texts)
    while some := [*itertools.islice(texts, TEXTS_AT_ONCE)]:
        encoded = encode(some)
        parts = [part for ids in encoded for part in windows(ids, begin, window, max(1, window // 2))]
        total = Predicted(
            total.texts + len(some),
            total.tokens + sum(map(len, encoded)),
            total.bytes + sum(len(text.encode()) for text in some),
            total.nats - sum(log_probs(parts)),
        )
    return total


def read_texts(path: Path) -> Iterator[str]:
    """The texts of a file: of a .jsonl each line's "text", or the turns of its chat joined by line breaks; any other
    file is one text.

    Raises:
        UserError, DataError: missing, not UTF-8, or a malformed line.
    """
    if not path.is_file():
        raise UserError(f"--ppl {path} is missing")
    if path.suffix == ".jsonl":
        yield from JsonlReader(path, lambda record, ignored: _text_of(record))
        return
    try:
        yield path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"--ppl {path} is not UTF-8 ({error.reason} at byte {error.start})") from None


def _text_of(record: dict) -> str:
    text = record.get("text")
    if text is None:
        turns = next((record[key] for key in ("conversations", "chosen") if key in record), None)
        if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
            raise BadRecord('there is neither a "text" nor a chat')
        contents = [turn.get("content") for turn in turns]
        if not all(isinstance(content, str) for content in contents):
            raise BadRecord("the content of a turn is not text")
        text = "\n".join(contents)
    if not isinstance(text, str) or not text:
        raise BadRecord('"text" is empty, or not text')
    return text
