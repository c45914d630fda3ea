"""Chatting with a model at a terminal or through a pipe: reading questions and printing answers."""

import itertools
import sys
import time
from collections.abc import Iterable, Iterator

from trainer.errors import UserError


def typed_line(prompt: str) -> str:
    """A line that a person types, without white space around it.

    Raises:
        EOFError: the input has ended.
        UserError: it is not UTF-8.
    """
    try:
        line = input(prompt)
        line.encode()  # under LANG=C other bytes become lone surrogates
    except UnicodeError:
        raise UserError("the input is not UTF-8: set the terminal to UTF-8, and LANG to, say, C.UTF-8") from None
    return line.strip()


def read_line(prompt: str) -> str:
    """A line that a person types; empty at the end of input.

    Raises:
        UserError: it is not UTF-8.
    """
    try:
        return typed_line(prompt)
    except EOFError:
        print()
        return ""


def piped_lines() -> Iterator[str]:
    """The piped lines, stripped, without empty ones.

    They are read as bytes and decoded here, because the system's own encoding of pipes may not be UTF-8 (on Windows),
    or may turn other bytes into lone surrogates (under LANG=C).

    Raises:
        UserError: a line is not UTF-8.
    """
    for number, line in enumerate(sys.stdin.buffer, 1):
        try:
            text = line.decode("utf-8-sig" if number == 1 else "utf-8").strip()
        except UnicodeDecodeError as error:
            raise UserError(
                f"the piped input is not UTF-8 (line {number}: {error.reason} at byte {error.start + 1})"
            ) from None
        if text:
            yield text


def questions(prompts: list[str] | None, samples: Iterable[str], by_hand: bool) -> Iterator[str]:
    """The questions: typed ones until an empty line, or `prompts`, or piped lines, or at a terminal `samples`.

    Raises:
        UserError: what is typed or piped in is not UTF-8.
    """
    if by_hand:
        while text := read_line("\n> "):
            yield text
    elif prompts:
        yield from prompts
    elif sys.stdin.isatty():
        yield from samples
    else:
        yield from piped_lines()


def recent(turns: list[dict], questions: int) -> list[dict]:
    """The last `questions` questions of a chat, each with the turns that followed it."""
    asked = [place for place, turn in enumerate(turns) if turn["role"] == "user"]
    return turns[asked[-min(questions, len(asked))] :] if questions and asked else []


def room_for_prompt(context: int, max_new_tokens: int) -> int:
    """The number of tokens that the longest answer leaves for the prompt.

    Raises:
        UserError: none are left.
    """
    if max_new_tokens >= context:
        raise UserError(f"--max_new_tokens {max_new_tokens}: the model's context is {context}")
    return context - max_new_tokens


def stream_texts(stream, pieces: list) -> Iterator[str]:
    """Yield the text of each piece of an engine's answer as it comes, and append the piece to `pieces`."""
    for piece in stream:
        pieces.append(piece)
        yield piece.text


def report_speed(pieces: Iterable, started: float, prefix: str = "") -> None:
    """Report on stderr the number of tokens in an engine's pieces or answers, and the speed since `started`."""
    seconds, count = time.monotonic() - started, sum(len(piece.tokens) for piece in pieces)
    print(f"[{prefix}{count} tokens, {count / seconds:.1f} tokens/s]", file=sys.stderr)


def show(pieces, reasoning: bool, hide_thinking: bool, opened: bool = False) -> None:
    """Print an answer as its pieces come; a reasoning model's thinking and answer get headings.

    Args:
        opened: the prompt has already opened a thought.
    """
    from model.reasoning import THOUGHT_BEGUN, split_stream

    shown = ""
    if opened:
        pieces = itertools.chain((THOUGHT_BEGUN,), pieces)
    for part, text in split_stream(pieces) if reasoning else (("", piece) for piece in pieces):
        if part == "thinking" and hide_thinking:
            continue
        if part != shown and not hide_thinking:
            print(f"{chr(10) if shown else ''}[{part}]")
        shown = part
        print(text, end="", flush=True)
    print()
