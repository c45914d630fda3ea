"""From chats and texts to token ids, with the loss mask: the one place where prompts are built.

A chat reads

    <s>system\n{system}</s>\n<s>user\n{content}</s>\n<s>assistant\n{answer}</s>\n

It is encoded piece by piece, with the control tokens inserted between the pieces as ids. Hence the mask is exact, and
typed text can never turn into a control token. With tools the system turn ends with the list of them, an answer may end
with calls, and `<s>tool\\n{result}</s>\\n` holds what they returned; see `model.tool_calls`.
"""

import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from model.fast_bpe import encode_parts
from model.template_chat import LANDMARKS, ROLES, Landmarks, lays_out_thinking, parts_by_template, targets_by_template
from model.tool_calls import listing, with_calls

DEFAULT_SYSTEM_PROMPT = "你是 MiniMind，是一个有用的人工智能助手。"
TEXT_BEGIN, TEXT_END = "<s>", "</s>"  # which a pretraining text may contain literally
IMAGE_MARKER = "<image>"  # an image's placeholder in a data line, and the shipped tokenizer's token for it
IMAGE_PLACE = -1  # placeholder id of image tokens until they get their own id: no text renders to it
CALL_CHARS = 1 << 20  # characters per tokenizer call…
STRETCH_CHARS = 1 << 16  # …and per item in it, so that the tokenizer's threads share a long text

Content = str | list[str | list[int]]  # text, or pieces of text and ids taken as they are, such as an image's tokens
Chat = Sequence[dict[str, Any]]  # turns {"role": str, "content": Content}, optionally "weight": 0 or 1, "tool_calls"


def render_chats(
    tokenizer: PreTrainedTokenizerFast, chats: Sequence[Chat], add_generation_prompt: bool = False, **thinking
) -> list[tuple[list[int], list[bool]]]:
    """`render_chat_arrays`, as lists."""
    arrays = render_chat_arrays(tokenizer, chats, add_generation_prompt, **thinking)
    return [(ids.tolist(), mask.tolist()) for ids, mask in arrays]


def render_chat_arrays(
    tokenizer: PreTrainedTokenizerFast,
    chats: Sequence[Chat],
    add_generation_prompt: bool = False,
    open_thinking: bool = False,
    tools: Sequence[dict] | None = None,
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Render chats to token ids and loss masks; all text goes to the tokenizer together, for its threads.

    Args:
        tokenizer: a byte-level BPE with `<s>` as bos and `</s>` as eos; not modified. MiniMind-3's lays chats out by
            its own template, see `model.template_chat`.
        chats: each a list of {"role": "system" | "user" | "assistant" | "tool", "content": Content}. One that does not
            begin with a system turn gets `DEFAULT_SYSTEM_PROMPT` in front. A turn with "weight" 0 is not trained on.
            An assistant's may have "tool_calls", the first of a chat the "tools" that may be called.
        add_generation_prompt: end each chat with `<s>assistant\\n`, ready for the model to answer.
        open_thinking: the answer begins with a thought; only in MiniMind-3's layout.
        tools: the tools that the model may call if a chat does not list its own.

    Returns:
        for each chat (ids int64, loss mask bool), both (n,); the mask is True exactly at the tokens of an assistant's
        content and calls and at the `</s>` that closes them, if its turn is trained on.

    Raises:
        ValueError: an unknown role, content that is not a string or cannot be encoded as UTF-8, or what this layout
            does not have.
    """
    guards = _guards(tokenizer)
    if lays_out_thinking(tokenizer):
        texts = [
            parts_by_template(
                tokenizer, chat, guards, _cut, add_generation_prompt, open_thinking, _tools_of(chat, tools)
            )
            for chat in chats
        ]
        encoded = _encode(tokenizer, [*LANDMARKS, *texts])
        marks, encoded = Landmarks(*encoded[:3]), encoded[3:]
        return [
            (ids.astype(np.int64), targets_by_template(tokenizer, ids, chat, marks))
            for ids, chat in zip(encoded, chats, strict=True)
        ]
    if open_thinking:
        raise ValueError("only MiniMind-3's chat layout has thoughts to be opened")
    chats = [_listed(chat, _tools_of(chat, tools)) for chat in chats]
    headers = [[f"{role}\n"] for role in ROLES]
    pieces = [(piece, turn["role"]) for chat in chats for turn in chat for piece in _pieces(turn)]
    contents = [_cut(piece, guards[role]) for piece, role in pieces if isinstance(piece, str)]
    encoded = iter(_encode(tokenizer, [*headers, ["\n"], [DEFAULT_SYSTEM_PROMPT], *contents]))

    bos, eos = [tokenizer.bos_token_id], [tokenizer.eos_token_id]
    head = {role: np.concatenate([bos, next(encoded)]) for role in ROLES}
    tail = np.concatenate([eos, next(encoded)])
    default_system = np.concatenate([head["system"], next(encoded), tail])

    rendered = []
    for chat in chats:
        parts = [] if chat and chat[0]["role"] == "system" else [default_system]
        length, learned = sum(map(len, parts)), []
        for turn in chat:
            role = turn["role"]
            content = [next(encoded) if isinstance(piece, str) else piece for piece in _pieces(turn)]
            begin = length + len(head[role])
            end = begin + sum(map(len, content))
            if role == "assistant" and turn.get("weight", 1) != 0:
                learned.append((begin, end + 1))  # with the </s>, and without the line break behind it
            parts += [head[role], *content, tail]
            length = end + len(tail)
        if add_generation_prompt:
            parts.append(head["assistant"])
        ids = np.concatenate(parts, dtype=np.int64)
        mask = np.zeros(len(ids), dtype=bool)
        for begin, end in learned:
            mask[begin:end] = True
        rendered.append((ids, mask))
    return rendered


def render_chat(
    tokenizer: PreTrainedTokenizerFast, chat: Chat, add_generation_prompt: bool = False, **thinking
) -> tuple[list[int], list[bool]]:
    """Render one chat; see `render_chat_arrays`."""
    return render_chats(tokenizer, [chat], add_generation_prompt, **thinking)[0]


def render_text(tokenizer: PreTrainedTokenizerFast, texts: Iterable[str]) -> list[list[int]]:
    """`render_text_arrays`, as lists."""
    return [ids.tolist() for ids in render_text_arrays(tokenizer, texts)]


def render_text_arrays(tokenizer: PreTrainedTokenizerFast, texts: Iterable[str]) -> list[np.ndarray]:
    """Render pretraining samples, `<s>text</s>`.

    A literal `<s>` at the start and `</s>` at the end of a text (one published form of the data has them), or the
    tokenizer's own delimiters there, are not doubled; anywhere else they are plain text.

    Returns:
        the ids of each text, int64 (n,).

    Raises:
        ValueError: a text that cannot be encoded as UTF-8.
    """
    bos, eos = tokenizer.bos_token, tokenizer.eos_token
    guard = _guards(tokenizer)["assistant"]
    bodies = []
    for text in texts:
        text = text.removeprefix(bos if text.startswith(bos) else TEXT_BEGIN)
        bodies.append(_cut(text.removesuffix(eos if text.endswith(eos) else TEXT_END), guard))
    begin, end = [tokenizer.bos_token_id], [tokenizer.eos_token_id]
    return [np.concatenate([begin, ids, end]) for ids in _encode(tokenizer, bodies)]


def _pieces(turn: dict[str, Any]) -> list[str | list[int]]:
    if turn["role"] not in ROLES:
        raise ValueError(f"unknown role {turn['role']!r}: use {', '.join(ROLES)}")
    content = turn["content"]
    if not isinstance(content, str | list):
        raise ValueError(f"the content of a turn must be a string, not {type(content).__name__}")
    pieces = content if isinstance(content, list) else [content]
    calls = turn.get("tool_calls")
    if not calls:
        return pieces
    *before, last = pieces or [""]
    return [*before, with_calls(last, calls)] if isinstance(last, str) else [*pieces, with_calls("", calls)]


def _tools_of(chat: Chat, tools: Sequence[dict] | None) -> Sequence[dict] | None:
    return (chat[0].get("tools") if chat else None) or tools


def _listed(chat: Chat, tools: Sequence[dict] | None) -> Chat:
    """The chat, with its tools listed at the end of the system turn."""
    if not tools:
        return chat
    default = {"role": "system", "content": DEFAULT_SYSTEM_PROMPT}
    system, *rest = chat if chat and chat[0]["role"] == "system" else (default, *chat)
    *before, last = _pieces(system) or [""]
    pieces = [*before, last + listing(tools)] if isinstance(last, str) else [*before, last, listing(tools)]
    return [{"role": "system", "content": pieces}, *rest]


def _guards(tokenizer: PreTrainedTokenizerFast) -> dict[str, re.Pattern]:
    """For each role, a pattern matching the added tokens that its text must not produce.

    An answer may use the tags (`<think>`, …) but no special token; other roles' text may use neither.
    """
    added = tokenizer.added_tokens_decoder.values()
    every = _match_any(token.content for token in added)
    special = _match_any(token.content for token in added if token.special)
    return {"system": every, "user": every, "assistant": special, "tool": every}


def _match_any(literals: Iterable[str]) -> re.Pattern:
    return re.compile("|".join(map(re.escape, literals)))


def _cut(text: str, guard: re.Pattern) -> list[str]:
    """Split a text into parts to encode separately, after the first character of each literal that `guard` finds.

    The tokenizer turns the literal text of an added token into that token wherever it is whole. Split in two it is
    ordinary text, and the tokens still spell every character.
    """
    parts, start = [], 0
    while found := guard.search(text, start):
        parts.append(text[start : found.start() + 1])
        start = found.start() + 1
    parts.append(text[start:])
    return parts


def _encode(tokenizer: PreTrainedTokenizerFast, texts: list[list[str]]) -> list[np.ndarray]:
    """The ids of each text, int64 (n,); its parts are encoded separately and joined."""
    backend = tokenizer.backend_tokenizer
    if backend.truncation or backend.padding:  # left over from a call with truncation=True: not ours to change
        backend = Tokenizer.from_str(backend.to_str())
        backend.no_truncation()
        backend.no_padding()
    ids: list[list[np.ndarray]] = [[] for _ in texts]
    try:
        for call in _calls(texts):
            stretches = [stretch for _, stretch in call]
            for (text, _), found in zip(call, encode_parts(backend, stretches), strict=True):
                ids[text].append(found)
    except TypeError as error:  # all that the Rust side, whose strings are UTF-8, says of one that is not
        raise ValueError("a text contains a lone surrogate (half a character), which UTF-8 cannot encode") from error
    return [found[0] if len(found) == 1 else np.concatenate(found) for found in ids]


def _calls(texts: list[list[str]]) -> Iterator[list[tuple[int, list[str]]]]:
    """Batches for the tokenizer, of (index of the text, its parts): each `CALL_CHARS` characters or slightly more.

    One batch is almost always enough. But a token takes 400 bytes inside the tokenizer, so a 50 MB text in one call
    would take 6 GB.
    """
    call, chars = [], 0
    for text, parts in enumerate(texts):
        for stretch in _stretches(parts):
            call.append((text, stretch))
            chars += sum(map(len, stretch))
            if chars >= CALL_CHARS:
                yield call
                call, chars = [], 0
    if call:
        yield call


def _stretches(parts: list[str]) -> Iterator[list[str]]:
    """All parts of a text together, or those of a very long text in stretches of at most `STRETCH_CHARS`.

    A stretch ends before white space, where the pre-tokenizer ends a word too, so the tokens stay the same.
    Only where half a stretch has no white space is it cut elsewhere, which may cost one more token.
    """
    if sum(map(len, parts)) <= STRETCH_CHARS:
        yield parts
        return
    for part in parts:
        start = 0
        while len(part) - start > STRETCH_CHARS:
            end = start + STRETCH_CHARS
            ends = range(end, end - STRETCH_CHARS // 2, -1)
            end = next((i for i in ends if part[i].isspace() and not part[i - 1].isspace()), end)
            yield [part[start:end]]
            start = end
        yield [part[start:]]


def fit_history(
    tokenizer: PreTrainedTokenizerFast, system: list[dict], turns: list[dict], room: int, **thinking
) -> tuple[list[int], list[dict]]:
    """The prompt for the last question in `turns`, with as much of the history as fits.

    Whole turns are dropped from the front, a question with all that follows up to the next one; the system prompt and
    the last question stay, with the calls and results after it.

    Args:
        system: the system turn, or empty for the default one.
        turns: questions and answers, ending with a question or with tool results for it.
        room: the maximum length of the prompt in tokens.
        thinking: `open_thinking` and `tools`, as in `render_chat_arrays`.

    Returns:
        the prompt's ids, and the turns that are in it.

    Raises:
        ValueError: the last question alone does not fit.
    """
    while True:
        ids, _ = render_chat(tokenizer, [*system, *turns], add_generation_prompt=True, **thinking)
        if len(ids) <= room:
            return ids, turns
        next_question = next((n for n in range(1, len(turns)) if turns[n]["role"] == "user"), None)
        if next_question is None:
            raise ValueError(f"the question takes {len(ids)} tokens with its system prompt, but only {room} fit")
        turns = turns[next_question:]
