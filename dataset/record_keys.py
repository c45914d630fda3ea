"""Which keys the lines of data files may have, and reading the value of one.

No key of a line is silently ignored. A `Keys` says which keys of an object are used and which are refused because
ignoring them would change the training; the others, which have no meaning here (an id, a source, a score), are counted
by name in `ignored`. A refused key that is null or empty is only counted. Keys that differ from ours only in letter
case or underscores ("System", "toolCalls") are taken to mean the same, and are refused.
"""

from collections.abc import Mapping
from functools import lru_cache
from types import MappingProxyType
from typing import NamedTuple

from dataset.jsonl import BadRecord, Ignored
from dataset.shapes import recognise_shape
from dataset.tool_records import IN_LINE, IN_TURN, says_nothing


class Keys(NamedTuple):
    """The keys of an object: required ones, optional ones, and refused ones with the reasons."""

    needed: tuple[str, ...]
    used: tuple[str, ...] = ()
    refused: Mapping[str, str] = MappingProxyType({})

    def check(self, found: dict, ignored: Ignored, where: str = "") -> None:
        """Count the keys without a meaning here, as "id", or "id (turn)" with `where` " (turn)".

        Raises:
            BadRecord: a key is missing, or a refused key is not empty.
        """
        for key in self.needed:
            if key not in found:
                raise BadRecord(f'the key "{key}" is missing{looks_like(found)}')
        for key, value in found.items():
            if key in self.needed or key in self.used:
                continue
            why = self._why_refused(key)
            if why and not says_nothing(value):
                raise BadRecord(f'the key "{key}" is refused: {why}')
            ignored[key + where] += 1

    def _why_refused(self, key: str) -> str | None:
        ours = {name: f'it is spelled "{name}"' for name in (*self.needed, *self.used)}
        return next((why for name, why in (ours | self.refused).items() if _letters(name) == _letters(key)), None)


@lru_cache(1000)
def _letters(key: str) -> str:
    return "".join(filter(str.isalnum, key)).lower()


CALLS_IN_TURNS = dict.fromkeys(("tool_calls", "function_call"), "it belongs in a turn, not in the line")
TOOLS_IN_LINE = {"functions": 'a turn has its calls in "tool_calls"; the available tools are the line\'s "tools"'}
NO_WEIGHT = dict.fromkeys(("weight", "train"), "it belongs in a turn, not in the line")
NO_PICTURES = dict.fromkeys(("image", "images"), "only train_pretrain_vlm.py and train_sft_vlm.py train on pictures")
NO_MEDIA = dict.fromkeys(("video", "videos", "audio", "audios"), "only text and pictures are supported")
OTHER_THOUGHT = dict.fromkeys(
    ("reasoning", "reasoning_details", "thinking", "thought", "thoughts", "think", "cot"),
    'the key for thoughts is "reasoning_content"',
)
OTHER_WEIGHT = dict.fromkeys(
    ("loss", "loss_mask", "loss_weight", "mask", "masked", "training", "trained", "trainable", "weights"),
    'use "weight" or "train" to mask a turn',
)
OTHER_SYSTEM = dict.fromkeys(("system_prompt", "system_message"), 'the key for a system prompt is "system"')
OTHER_PICTURES = dict.fromkeys(
    ("images", "image_path", "image_paths", "image_file", "image_url", "img", "picture", "pictures"),
    'the key for pictures is "image"',
)
OTHER_PROMPTS = ("question", "instruction", "query", "input", "context")  # of pairs: for us, it is "prompt"
SECOND_CHAT = dict.fromkeys(("messages", "conversation"), "a second chat in one line")
ELSEWHERE = {
    "history": "earlier turns belong in the chat",
    "reasoning_content": "it belongs in a turn, not in the line",
}

TEXT = Keys(("text",), (), dict.fromkeys(NO_WEIGHT, "a text cannot be masked: leave its line out"))
CHAT_REFUSED = {**CALLS_IN_TURNS, **NO_WEIGHT, **NO_MEDIA, **SECOND_CHAT, **OTHER_SYSTEM, **ELSEWHERE}
CHAT = Keys(("conversations",), ("system", "prompt", *IN_LINE), {**CHAT_REFUSED, **NO_PICTURES})
PICTURES = Keys(("conversations",), ("system", "prompt", "image", *IN_LINE), {**CHAT_REFUSED, **OTHER_PICTURES})
PAIR = Keys(
    ("chosen", "rejected"),
    ("prompt", "system", *IN_LINE),
    {**CHAT.refused, "conversations": 'the key for the turns that both answer is "prompt"'},
)
QUESTION = Keys(
    ("question",),
    ("system", *IN_LINE),
    {**CHAT.refused, **dict.fromkeys(("conversations", "prompt"), 'a second question, beside "question"')},
)
TURN = Keys(
    (),
    ("role", "content", "reasoning_content", "weight", "train", *IN_TURN),
    {
        **TOOLS_IN_LINE,
        **NO_PICTURES,
        **NO_MEDIA,
        **OTHER_THOUGHT,
        **OTHER_WEIGHT,
        "value": 'the key for a turn\'s text is "content"',
        "channel": 'the key for thoughts is "reasoning_content"',
    },
)


def looks_like(record: dict) -> str:
    """A description of an unreadable line, to be added after the reason."""
    shape = recognise_shape(record)
    return f" (this is {shape})" if shape else ""


def value_at(found: dict, key: str, kind: type, kind_name: str):
    if key not in found:
        raise BadRecord(f'the key "{key}" is missing')
    if not isinstance(found[key], kind):
        raise BadRecord(f'"{key}" is not {kind_name}{_what_instead(found[key])}')
    return found[key]


def _what_instead(value: object) -> str:
    if value is None:
        return " but null"
    if isinstance(value, list) and value and isinstance(value[0], dict) and "type" in value[0]:
        return " but a list of parts: join their texts into one"
    if isinstance(value, str) and value.lstrip()[:1] == "[":
        return " but JSON inside a string: write the list itself"
    if isinstance(value, dict) and "role" in value:
        return " but a single turn: put it in a list"
    return ""


def string_at(record: dict, key: str) -> str:
    text = value_at(record, key, str, "a string")
    try:
        text.encode()
    except UnicodeEncodeError as error:  # JSON can spell half a character, "\ud83d", which no tokenizer takes
        raise BadRecord(f'"{key}" contains a lone surrogate (half a character)') from error
    return text
