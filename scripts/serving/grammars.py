"""Constraints on answers from a JSON schema, a regular expression, a list of choices, or tools.

llguidance (by Microsoft, an Earley parser over the bytes of tokens) says which tokens keep the text within its grammar.
JSON has the format of `json.dumps`, `{"a": 1, "b": [2, 3]}`, on which the models here are trained.
"""

import json
import re
import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from llguidance import LLMatcher, LLTokenizer, TokenizerWrapper
from transformers import PreTrainedTokenizerFast

from model.inference.constraint import unpacked
from model.tokenizer import token_bytes
from model.tool_calls import CALL_BEGIN, CALL_END

LAYOUT = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
ANY_OBJECT = {"type": "object"}
MOST_CALLS = 8  # in an answer that must call
KEPT = 64  # grammars of late that need not be made again
WATCHED = 128  # minimum number of last tokens in which it is ensured that open brackets can be closed
LONGEST_WAY = 4096  # tokens of the shortest answer that is looked for
NEVER, LATER = 1 << 40, 1 << 20  # ranks
NEAR = 16  # tokens to spare, below which even those that open nothing are looked at
OPENING = b'{["<,:\n'  # bytes of tokens that may open something
OUT_OF_JSON = b']}",:0123456789ntf[{-'  # the order in which single bytes end a JSON text soonest…
OUT_OF_TEXT = b'"' + OUT_OF_JSON  # …and one whose string is open
OUT_OF_PATTERN = bytes(range(33, 48)) + bytes(range(58, 65)) + b"0123456789" + b" \n"  # of a regular expression


class Vocabulary:
    """A tokenizer's tokens in the form that grammars need."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast):
        self.eos_token_id, self.bos_token_id = tokenizer.eos_token_id, tokenizer.bos_token_id
        self.spellings = token_bytes(tokenizer)
        names = tokenizer.convert_ids_to_tokens(range(len(self.spellings)))
        self.tokens = [spelled or name.encode() for spelled, name in zip(self.spellings, names, strict=True)]
        self.special_token_ids = [token for token, spelled in enumerate(self.spellings) if not spelled]
        self._backend = tokenizer.backend_tokenizer
        self.for_matchers = LLTokenizer(TokenizerWrapper(self))
        self.brace, self.bracket = (self.spellings.index(byte) for byte in (b"}", b"]"))

    def __call__(self, text: bytes | str) -> list[int]:
        text = text.decode() if isinstance(text, bytes) else text
        return self._backend.encode(text, add_special_tokens=False).ids

    def spell(self, text: bytes) -> list[int]:
        """The tokens of a text that may begin or end within a character."""
        try:
            return self.for_matchers.greedy_tokenize(text.decode())
        except UnicodeDecodeError:
            return [self.spellings.index(bytes([byte])) for byte in text]

    def ranks(self, order: bytes) -> np.ndarray:
        """The rank of each token: the given single bytes in order, then the other tokens, shortest first."""
        return np.array(
            [
                order.index(spelled) if len(spelled) == 1 and spelled in order else len(order) + len(spelled)
                for spelled in self.tokens
            ]
        )


class Grammar:
    """A constraint by a grammar; see `model.inference.constraint`.

    Args:
        matcher: a matcher at the beginning of the text.
        ways_out: ranks of tokens by how soon they end a text, outside JSON strings and within one.
        pattern: the form is not JSON: any token may open something, and none of those that lead out leads out twice.
    """

    def __init__(
        self, matcher: LLMatcher, vocabulary: Vocabulary, ways_out: tuple[np.ndarray, np.ndarray], pattern: bool
    ):
        self.matcher, self.vocabulary, self.ways_out, self.pattern = matcher, vocabulary, ways_out, pattern
        self.watched = max(WATCHED, 2 * len(self.way_out(matcher.deep_copy(), LONGEST_WAY) or ()))

    def begin(self) -> "Text":
        return Text(self)

    def way_out(self, matcher: LLMatcher, most: int) -> list[int] | None:
        """Tokens that complete the text, few though not always the fewest; None if `most` are not enough.

        Args:
            matcher: a matcher at the text's end, which is advanced.
        """
        way: list[int] = []
        used = np.zeros(len(self.vocabulary.tokens), np.int64)  # a pattern's loops are left by what was not tried yet
        while not matcher.is_accepting():
            step = self.vocabulary.spell(matcher.compute_ff_bytes())  # what can only come next
            if not step:
                allowed = unpacked(packed(matcher)[None], len(self.vocabulary.tokens))[0]
                if not allowed.any():
                    return None
                in_text = allowed[self.vocabulary.brace] and allowed[self.vocabulary.bracket]  # never both in JSON
                step = [int(np.where(allowed, self.ways_out[int(in_text)] + used, NEVER).argmin())]
                used[step] += LATER if self.pattern else 0
            if len(way) + len(step) > most or matcher.try_consume_tokens(step) < len(step):
                return None
            way += step
        return way


def packed(matcher: LLMatcher) -> np.ndarray:
    """The tokens that may come next, see `ConstrainedText.allowed`."""
    return np.frombuffer(matcher.compute_bitmask(), np.uint8)


class Text:
    """The state of an answer's text within a grammar."""

    def __init__(self, grammar: Grammar):
        self._grammar = grammar
        self._matcher = grammar.matcher.deep_copy()
        self._way: list[int] | None = None  # tokens that make the text whole from here on, where they are known
        self._spare = 0  # tokens to spare if what was open at the last look had been closed; 0: not looked yet

    @property
    def whole(self) -> bool:
        return self._matcher.is_accepting()

    @property
    def finished(self) -> bool:
        return self._matcher.is_stopped()

    def allowed(self) -> np.ndarray:
        return packed(self._matcher)

    def settle(self, token: int, left: int) -> int:
        if left > self._grammar.watched or token == self._grammar.vocabulary.eos_token_id:
            return token
        spelled = self._grammar.vocabulary.tokens[token]
        self._spare -= 1 + len(spelled)  # as if each byte of it were one more to be closed
        opens = self._grammar.pattern or self.whole or any(byte in OPENING for byte in spelled)
        if self._spare > NEAR and not opens:
            self._way = None
            return token
        after = self._matcher.deep_copy()
        after.consume_token(token)
        way = self._grammar.way_out(after, left - 1)
        if way is not None:
            self._way, self._spare = way, left - 1 - len(way)
            return token
        if self._way is None:
            self._way = self._grammar.way_out(self._matcher.deep_copy(), left)
        self._spare = 0
        if self._way is None:
            return token
        first, *self._way = self._way or [self._grammar.vocabulary.eos_token_id]
        return first

    def take(self, token: int) -> None:
        self._matcher.consume_token(token)


class Grammars:
    """Makes constraints for a tokenizer's models, and caches the last ones. May be used from several threads."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast):
        self.vocabulary = Vocabulary(tokenizer)
        self._json = self.vocabulary.ranks(OUT_OF_JSON), self.vocabulary.ranks(OUT_OF_TEXT)
        self._pattern = (self.vocabulary.ranks(OUT_OF_PATTERN),) * 2
        self._kept: OrderedDict[str, Grammar] = OrderedDict()
        self._lock = threading.Lock()

    def make(self, form: str, pattern: bool = False) -> Grammar:
        """The constraint of a form, see `schema_form` and the others.

        Args:
            pattern: the form is not JSON.

        Raises:
            ValueError: something in it is not supported; one line.
        """
        with self._lock:
            if form in self._kept:
                self._kept.move_to_end(form)
                return self._kept[form]
        matcher = LLMatcher(self.vocabulary.for_matchers, LLMatcher.grammar_from_lark(f"start: {form}"), log_level=0)
        if matcher.is_error():
            raise ValueError(_told(matcher.get_error()))
        grammar = Grammar(matcher, self.vocabulary, self._pattern if pattern else self._json, pattern)
        with self._lock:
            self._kept[form] = grammar
            if len(self._kept) > KEPT:
                self._kept.popitem(last=False)
        return grammar


# ------------------------------------------------------------------------------------- forms, in llguidance's Lark


def schema_form(schema: Mapping[str, Any] | bool) -> str:
    """JSON that a schema accepts.

    Raises:
        ValueError: an unsupported keyword, or an invalid value of one; one line.
    """
    schema = ({} if schema else {"enum": []}) if isinstance(schema, bool) else schema
    laid_out = {**schema, "x-guidance": LAYOUT}
    failed, told = LLMatcher.validate_grammar_with_warnings(LLMatcher.grammar_from_json_schema(laid_out))
    if failed:
        raise ValueError(_told(told[0]))
    return f"%json {json.dumps(laid_out)}"


def pattern_form(pattern: str) -> str:
    """Text that is fully matched by a regular expression (Rust's syntax, without look-around).

    Raises:
        ValueError: it is not a valid one; one line.
    """
    grammar = LLMatcher.grammar_from_regex(pattern)
    failed, told = LLMatcher.validate_grammar_with_warnings(grammar)
    if failed:
        raise ValueError(_told(told[0]))
    return json.loads(grammar)["grammars"][0]["lark_grammar"].partition("start: ")[2].strip()


def choice_form(choices: Sequence[str]) -> str:
    """One of several texts."""
    return " | ".join(map(json.dumps, choices))


def calls_form(tools: Sequence[Mapping[str, Any]], several: bool) -> str:
    """Calls of tools, {"name", "parameters"} each.

    Args:
        several: allow more than one call.

    Raises:
        ValueError: as in `schema_form`.
    """
    calls = []
    for tool in tools:
        head = f'{CALL_BEGIN}\n{{"name": {json.dumps(tool["name"], ensure_ascii=False)}, "arguments": '
        try:
            arguments = schema_form(tool.get("parameters") or ANY_OBJECT)
        except ValueError as error:
            raise ValueError(f"{tool['name']}: {error}") from None
        calls.append(" ".join((json.dumps(head), arguments, json.dumps("}\n" + CALL_END))))
    again = f' ("\\n" call){{0,{MOST_CALLS - 1}}}' if several else ""
    return f"call{again}\ncall: {' | '.join(calls)}"


def _told(error: str) -> str:
    """llguidance's error in one line, naming the unsupported feature."""
    if found := re.search(r"Unimplemented keys: (\[.*?\])", error):
        names = ", ".join(f'"{name}"' for name in json.loads(found[1]))
        return f"the schema keyword {names} is not supported"
    lines = [line for line in error.splitlines() if not re.match(r"\s*(\d+ \||\^)", line)]
    return " ".join(" ".join(lines).split())[:300]
