"""Chats of tokenizers whose own template opens every answer with a thought, as MiniMind-3's does:

    <|im_start|>user\\n{content}<|im_end|>\\n<|im_start|>assistant\\n<think>\\n{thought}\\n</think>\\n\\n{answer}<|im_end|>\\n

The template itself renders the chat, including tools, calls and results. Three things are added to it: typed text never
becomes a control token, the loss mask, and the choice whether the answer is to begin with a thought. What the template
adds is prompt: the empty block `<think>\\n\\n</think>\\n\\n` of an answer without a thought, or the `<think>\\n` before
a thought. The thought, its `</think>`, the answer and the `<|im_end|>` are targets.
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from transformers import PreTrainedTokenizerFast

from model.tokenizer import token_bytes

ROLES = ("system", "user", "assistant", "tool")
OPEN, CLOSE = "<think>", "</think>"
PASSED_ON = ("tool_calls", "reasoning_content")  # of a turn, to the template
CUTS = [chr(code) for code in range(0xE000, 0xE100)]  # of the private use area: marks where a text is to be cut
Cut = Callable[[str, re.Pattern], list[str]]


def lays_out_thinking(tokenizer: PreTrainedTokenizerFast) -> bool:
    """Whether chats are rendered by the tokenizer's own template, as with MiniMind-3's tokenizer."""
    template = getattr(tokenizer, "chat_template", None)
    return isinstance(template, str) and "open_thinking" in template and {OPEN, CLOSE} <= _added(tokenizer).keys()


def _added(tokenizer: PreTrainedTokenizerFast) -> dict[str, int]:
    return {token.content: token_id for token_id, token in tokenizer.added_tokens_decoder.items()}


def parts_by_template(
    tokenizer: PreTrainedTokenizerFast,
    chat: Sequence[Mapping[str, Any]],
    guards: Mapping[str, re.Pattern],
    cut: Cut,
    add_generation_prompt: bool = False,
    open_thinking: bool = False,
    tools: Sequence[dict] | None = None,
) -> list[str]:
    """A chat's text in parts, to be encoded separately.

    Args:
        chat: turns {"role", "content"}; an assistant's may have a "reasoning_content" and "tool_calls".
        guards: by role, the literals that its text must not produce.
        cut: cuts a text within each literal that a guard finds.
        open_thinking: with `add_generation_prompt`: the answer begins with a thought.
        tools: the tools that the model may call, for the system turn.

    Raises:
        ValueError: an unknown role, content that is not text, or a chat that the template refuses.
    """
    said = json.dumps([*chat, tools], ensure_ascii=False, default=str)
    mark = next(char for char in CUTS if char not in said)
    turns = []
    for turn in chat:
        role, content = turn["role"], turn["content"]
        if role not in ROLES:
            raise ValueError(f"unknown role {role!r}: use {', '.join(ROLES)}")
        if isinstance(content, list) and all(isinstance(part, str) for part in content):
            content = "".join(content)
        if not isinstance(content, str):
            raise ValueError(f"the content of a turn must be a string, not {type(content).__name__}")
        thought = getattr(content, "thought", None)
        more = {} if thought is None else {"reasoning_content": thought}
        content = content if thought is None else content.answer
        more |= {name: turn[name] for name in PASSED_ON if turn.get(name) is not None}
        guard = guards["user" if role == "tool" else role]
        turns.append({"role": role, **_cut_texts({"content": content, **more}, mark, cut, guard)})
    tools = _cut_texts(tools, mark, cut, guards["system"])
    if not turns:
        return [""]
    try:
        text = tokenizer.apply_chat_template(
            turns, tools, tokenize=False, add_generation_prompt=add_generation_prompt, open_thinking=open_thinking
        )
    except Exception as error:  # Jinja's, of any class
        raise ValueError(f"the tokenizer's chat template refuses it: {' '.join(str(error).split())[:200]}") from None
    return text.split(mark)


def _cut_texts(value: Any, mark: str, cut: Cut, guard: re.Pattern) -> Any:
    """A JSON value with a mark at each place where one of its strings, other than keys, is to be cut."""
    if isinstance(value, str):
        return mark.join(cut(value, guard))
    if isinstance(value, Mapping):
        return {key: _cut_texts(each, mark, cut, guard) for key, each in value.items()}
    return [_cut_texts(each, mark, cut, guard) for each in value] if isinstance(value, list | tuple) else value


class Landmarks(NamedTuple):
    """The ids that mark turns in a rendered chat: of "assistant\\n", of "\\n" and of "\\n\\n", int64 each."""

    header: np.ndarray
    one_break: np.ndarray
    two_breaks: np.ndarray


LANDMARKS = (["assistant\n"], ["\n"], ["\n\n"])


def targets_by_template(
    tokenizer: PreTrainedTokenizerFast, ids: np.ndarray, chat: Sequence[Mapping[str, Any]], marks: Landmarks
) -> np.ndarray:
    """The loss mask of a chat's ids, bool (n,)."""
    mask = np.zeros(len(ids), dtype=bool)
    added = _added(tokenizer)
    begins = np.flatnonzero(ids == tokenizer.bos_token_id)
    ends = np.flatnonzero(ids == tokenizer.eos_token_id)
    weights = iter([turn.get("weight", 1) for turn in chat if turn["role"] == "assistant"])
    for begin in begins + 1:
        after = begin + len(marks.header)
        if not np.array_equal(ids[begin:after], marks.header):
            continue
        end = ends[np.searchsorted(ends, after)] if len(ends) and ends[-1] >= after else None
        if end is None:  # the prompt for an answer
            break
        if next(weights) == 0:
            continue
        empty = [added[OPEN], *marks.two_breaks, added[CLOSE]]
        if np.array_equal(ids[after : after + len(empty)], empty):
            begun, given = after + len(empty), marks.two_breaks
        else:
            begun, given = after + 1, marks.one_break
        first = begun + _prompt_length(tokenizer, ids[begun:end], given)
        mask[first : end + 1] = True
    return mask


def _prompt_length(tokenizer: PreTrainedTokenizerFast, ids: np.ndarray, given: np.ndarray) -> int:
    """How many of the ids spell only line breaks that the template gives.

    These are the tokens of the line breaks, unless the white space after them was merged in: then the token of both is
    a target.
    """
    if np.array_equal(ids[: len(given)], given):
        return len(given)
    spelled = token_bytes(tokenizer)
    room = sum(len(spelled[i]) for i in given)
    lengths = np.cumsum([len(spelled[i]) for i in ids[: room + 1]])
    return int((lengths <= room).sum())
