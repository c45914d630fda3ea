"""Answers that think first, and how to parse them:

<think>
12 + 30 = 42
</think>
<answer>
42
</answer>
"""

import itertools
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence

from transformers import PreTrainedTokenizerFast

from model.chat import render_text
from model.tokenizer import token_bytes

TAGS = ("<think>", "</think>", "<answer>", "</answer>")
THOUGHT_BEGUN = "<think>\n"  # the end of a prompt that opens a thought: the answer continues from there
_TAG = re.compile("|".join(TAGS))
_NO_TAG = rf"(?:(?!{_TAG.pattern}).)+"
FORMAT = re.compile(rf"<think>\n{_NO_TAG}\n</think>\n<answer>\n{_NO_TAG}\n</answer>", re.DOTALL)


def is_well_formed(text: str) -> bool:
    """Whether an answer has exactly the form above: each tag once, on its own line, non-empty parts, nothing else."""
    return FORMAT.fullmatch(text) is not None


class ThoughtfulAnswer(str):
    """An answer in the form above that remembers its `thought` and `answer`, for chat layouts of another form."""

    thought: str
    answer: str


def with_thought(thought: str, answer: str) -> ThoughtfulAnswer:
    """The text of an answer that thinks first, in the form above.

    Raises:
        ValueError: one of the two contains a tag, so that they could not be told apart.
    """
    for name, text in (("thought", thought), ("answer", answer)):
        if found := _TAG.search(text):
            raise ValueError(f"the {name} already contains the tag {found[0]}")
    text = ThoughtfulAnswer(f"<think>\n{thought}\n</think>\n<answer>\n{answer}\n</answer>")
    text.thought, text.answer = thought, answer
    return text


def thought_before_calls(thought: str) -> ThoughtfulAnswer:
    """The text of a turn that thinks and then calls tools without a word; the calls follow.

    Raises:
        ValueError: the thought contains a tag.
    """
    if found := _TAG.search(thought):
        raise ValueError(f"the thought holds the tag {found[0]}, and is to get tags of its own")
    text = ThoughtfulAnswer(f"<think>\n{thought}\n</think>")
    text.thought, text.answer = thought, ""
    return text


def tag_sequences(tokenizer: PreTrainedTokenizerFast) -> list[list[int]]:
    """The ids of each tag in an answer: one where the tokenizer has an entry for it, several pieces otherwise.

    If a tokenizer merges the last piece of a tag with the line break after it, as Llama 3's and Qwen's do, those ids
    are included as well.
    """
    pieces = token_bytes(tokenizer)
    sequences = []
    for tag in TAGS:
        (_, *alone, _), (_, *before_break, _) = render_text(tokenizer, [tag, f"{tag}\n"])
        if before_break[: len(alone)] != alone:
            ends = itertools.accumulate(len(pieces[i]) for i in before_break)
            length = next(n for n, end in enumerate(ends, 1) if end >= len(tag))
            sequences.append(before_break[:length])
        sequences.append(alone)
    return sequences


class ReasoningStream:
    """Separates thinking from answer while an answer is generated.

    Text between `<think>` and `</think>` is thinking, everything else is answer, also if there are no tags at all. The
    tags themselves, and white space next to them, belong to neither. Text that may become a tag, or white space before
    one, is held back until that is clear. A second stretch of the same part begins on a new line.
    """

    def __init__(self):
        self._part = "answer"
        self._waiting = ""
        self._at_start = True  # nothing but white space since the last tag
        self._seen: set[str] = set()

    def push(self, text: str) -> list[tuple[str, str]]:
        """The text that can be assigned now: ("thinking" | "answer", text) pairs, in order, none of them empty."""
        parts = []
        self._waiting += text
        while tag := _TAG.search(self._waiting):
            parts += self._emit(self._waiting[: tag.start()].rstrip())
            self._waiting = self._waiting[tag.end() :]
            self._part = "thinking" if tag[0] == "<think>" else "answer"
            self._at_start = True
        begun = next((i for i in range(len(self._waiting)) if _may_become_tag(self._waiting[i:])), len(self._waiting))
        clear = self._waiting[:begun].rstrip()
        self._waiting = self._waiting[len(clear) :]
        return parts + self._emit(clear)

    def flush(self) -> list[tuple[str, str]]:
        """The text that was still held back when the answer ended."""
        rest, self._waiting = self._waiting.rstrip(), ""
        return self._emit(rest)

    def _emit(self, text: str) -> list[tuple[str, str]]:
        if self._at_start:
            text = text.lstrip()
        if not text:
            return []
        if self._at_start and self._part in self._seen:
            text = "\n" + text
        self._at_start = False
        self._seen.add(self._part)
        return [(self._part, text)]


def _may_become_tag(text: str) -> bool:
    return any(tag.startswith(text) for tag in TAGS)


def split_stream(pieces: Iterable[str]) -> Iterator[tuple[str, str]]:
    """`ReasoningStream` over all pieces of an answer."""
    stream = ReasoningStream()
    for piece in pieces:
        yield from stream.push(piece)
    yield from stream.flush()


def split_reasoning(text: str) -> tuple[str, str]:
    """The thinking and the answer of a whole text; see `ReasoningStream`."""
    parts = list(split_stream([text]))
    thinking, answer = ("".join(text for part, text in parts if part == name) for name in ("thinking", "answer"))
    return thinking, answer


def majority(replies: Sequence[str]) -> tuple[str, int]:
    """A majority vote among replies to one question, by their answers, whatever the thinking before them
    (self-consistency, Wang et al. 2022, arXiv:2203.11171).

    Replies without an answer do not vote, unless none has one.

    Returns:
        the first reply with the most frequent answer (of equally frequent ones the first), white space ignored; and
        the number of replies with that answer.

    Raises:
        ValueError: no replies.
    """
    if not replies:
        raise ValueError("a vote needs at least one reply")
    answers = [" ".join(split_reasoning(reply)[1].split()) for reply in replies]
    winner, votes = Counter(filter(None, answers) if any(answers) else answers).most_common(1)[0]
    return replies[answers.index(winner)], votes
