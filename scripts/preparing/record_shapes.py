"""Common formats of records, recognised by their keys, and the content that stages can train on."""

from collections.abc import Callable
from typing import Any, NamedTuple

Turn = dict[str, Any]  # "role", "content", maybe "weight"


class Unusable(ValueError):
    """A record cannot be used for training; the message is one of a few reasons, so that they can be counted."""


class Piece(NamedTuple):
    """The content of a record: a text, a chat, or a chat with two answers.

    Attributes:
        shape: the format that was recognised.
        text: a plain text, else None.
        turns: those of a chat, or those before a pair's two answers.
        chosen, rejected: the turns of a pair, else None.
    """

    shape: str
    text: str | None = None
    turns: list[Turn] | None = None
    chosen: list[Turn] | None = None
    rejected: list[Turn] | None = None


TEXT_KEYS = ("text", "content", "raw_content", "body", "article", "document", "passage", "paragraph", "code")
CHAT_KEYS = ("conversations", "conversation", "messages", "dialogue", "dialog", "chat")
ASKED_KEYS = ("prompt", "question", "query", "input", "inputs", "user", "human")
ANSWERED_KEYS = ("response", "answer", "completion", "output", "outputs", "target", "targets", "assistant", "reply")
THOUGHT_KEYS = ("reasoning_content", "reasoning", "thinking", "thought", "think", "cot", "chain_of_thought")
PICTURE_KEYS = frozenset(("image", "images", "video", "videos", "audio", "audios"))
TOOL_KEYS = frozenset(("tool_calls", "function_call", "tools"))
NESTED_KEYS = ("data", "train", "rows", "examples", "items", "records")
ROLES = {
    **{"system": "system", "developer": "system"},
    **{"user": "user", "human": "user", "prompter": "user", "customer": "user", "student": "user", "用户": "user"},
    **{"assistant": "assistant", "gpt": "assistant", "bot": "assistant", "model": "assistant", "chatgpt": "assistant"},
    **{"ai": "assistant", "助手": "assistant", "teacher": "assistant"},
}
TOOLS = "uses tools, which are not prepared: train_full_sft.py reads them as they are"
PICTURES = "has pictures or sound, which no text stage supports"
NO_SHAPE = "an unknown shape: name its keys with --map"


def recognise(record: dict) -> Piece:
    """The content of a record, by its keys.

    Raises:
        Unusable: its format is unknown, or it cannot be used for training.
    """
    if len(record) == 1 and isinstance(text := record.get("text"), str):
        return Piece("text", text=clean(text))
    if not PICTURE_KEYS.isdisjoint(record) and any(record.get(key) for key in PICTURE_KEYS):
        raise Unusable(PICTURES)
    if "chosen" in record and "rejected" in record:
        return _pair(record)
    for key in CHAT_KEYS:
        if key in record and isinstance(record[key], list) and record[key]:
            return _chat(record, key)
    if "instruction" in record and any(key in record for key in ANSWERED_KEYS):
        return _alpaca(record)
    asked, answered = _key(record, ASKED_KEYS), _key(record, ANSWERED_KEYS)
    if asked and answered:
        return _asked_and_answered(record, asked, answered)
    if (key := next((key for key in TEXT_KEYS if isinstance(record.get(key), str)), None)) is not None:
        return Piece(key if key == "text" else f'a text in "{key}"', text=clean(record[key]))
    raise Unusable(NO_SHAPE)


def _key(record: dict, keys: tuple[str, ...]) -> str | None:
    return next((key for key in keys if key in record), None)


def clean(text: object) -> str:
    """A text that UTF-8 can encode: a lone surrogate becomes U+FFFD, which the filter of broken text finds."""
    if not isinstance(text, str):
        if text is None:
            return ""
        if isinstance(text, bytes):
            return text.decode("utf-8", errors="replace")
        if isinstance(text, bool | int | float):
            return str(text)
        if isinstance(text, list):
            return _parts(text)
        raise Unusable("a text that is an object")
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError:
            return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    return text


def _parts(parts: list) -> str:
    """The text of content that is a list of parts, as in OpenAI's API."""
    texts = []
    for part in parts:
        if isinstance(part, str):
            texts.append(clean(part))
        elif isinstance(part, dict) and isinstance(part.get("text"), str):
            texts.append(clean(part["text"]))
        elif isinstance(part, dict):
            raise Unusable(PICTURES)
        else:
            raise Unusable("a text that is a list")
    return "\n".join(texts)


def _chat(record: dict, key: str) -> Piece:
    turns = record[key]
    if record.get("tools") or record.get("functions"):
        raise Unusable(TOOLS)
    read, shape = read_turns(turns)
    if shape == "ours" and key == "messages":
        shape = "OpenAI"
    elif shape == "ours" and key != "conversations":
        shape = f'a chat in "{key}"'
    prompt = record.get("prompt")  # ours may repeat how the chat begins
    if isinstance(prompt, str) and prompt and read[0]["role"] == "assistant":
        read.insert(0, {"role": "user", "content": clean(prompt)})
    return Piece(shape, turns=_with_system(record, read))


def read_turns(turns: list) -> tuple[list[Turn], str]:
    """The turns of a chat with our names, and the format they had.

    Raises:
        Unusable: a turn with a role that no stage uses, or something that is not a turn.
    """
    read: list[Turn] = []
    shape = "ours"
    for number, turn in enumerate(turns):
        if isinstance(turn, str):
            read.append({"role": "assistant" if number % 2 else "user", "content": clean(turn)})
            shape = "a list of texts"
            continue
        if not isinstance(turn, dict):
            raise Unusable("a turn that is neither an object nor a text")
        if isinstance(role := turn.get("role"), str) and "content" in turn:
            content = turn["content"]
        elif "from" in turn and ("value" in turn or "content" in turn):
            role, content = turn["from"], turn.get("value", turn.get("content"))
            shape = "ShareGPT"
        elif "content" in turn and "role" not in turn and not {"speaker", "author"} & turn.keys():
            role, content = "assistant" if read and read[-1]["role"] == "user" else "user", turn["content"]
        else:
            role = next((turn[key] for key in ("role", "speaker", "author") if key in turn), None)
            content = next(
                (turn[key] for key in ("content", "value", "text", "message", "utterance") if key in turn), None
            )
            shape = "a chat with other names"
        if len(turn) > 2 and any(str(turn.get(key) or "").strip() not in ("", "[]", "null") for key in TOOL_KEYS):
            raise Unusable(TOOLS)
        name = ROLES.get(role) if isinstance(role, str) else None
        name = name or ROLES.get(str(role).strip().lower())
        if name is None:
            known = str(role).lower() in ("tool", "function", "observation", "function_call", "ipython", "environment")
            raise Unusable(TOOLS if known else "an unknown role: name its keys with --map")
        one = {"role": name, "content": content if isinstance(content, str) and content.isascii() else clean(content)}
        if len(turn) > 2 and name == "assistant":
            _add_extras(turn, one)
        read.append(one)
    return read, shape


def _add_extras(turn: dict, one: Turn) -> None:
    """Add a turn's thought, in our tags, and its weight if it is not trained on."""
    thought = next((turn[key] for key in THOUGHT_KEYS if isinstance(turn.get(key), str) and turn[key].strip()), None)
    if thought:
        one["content"] = think(clean(thought), one["content"])
    if turn.get("weight") == 0 or turn.get("train") is False:
        one["weight"] = 0


def think(thought: str, answer: str) -> str:
    """An answer with the thought before it, in tags; empty if there is no answer."""
    return f"<think>\n{thought.strip()}\n</think>\n<answer>\n{answer.strip()}\n</answer>" if answer.strip() else ""


def _with_system(record: dict, turns: list[Turn]) -> list[Turn]:
    system = record.get("system") or record.get("system_prompt") or record.get("system_message")
    if isinstance(system, str) and system.strip() and turns[0]["role"] != "system":
        return [{"role": "system", "content": clean(system)}, *turns]
    return turns


def _alpaca(record: dict) -> Piece:
    asked = clean(record["instruction"])
    given = clean(record.get("input"))
    if given.strip() and given.strip().lower() not in ("<noinput>", "nan", "none"):
        asked = f"{asked}\n{given}" if asked.strip() else given
    answered = next(key for key in ANSWERED_KEYS if key in record)
    return Piece("Alpaca", turns=_exchange(record, asked, clean(record[answered])))


def _exchange(record: dict, asked: str, answer: str) -> list[Turn]:
    """The turns of the history, the question and the answer."""
    turns: list[Turn] = []
    for exchange in record.get("history") or []:
        if not isinstance(exchange, list | tuple) or len(exchange) != 2:
            raise Unusable('a "history" that is not made of pairs')
        turns += (
            {"role": role, "content": clean(text)} for role, text in zip(("user", "assistant"), exchange, strict=True)
        )
    thought = next(
        (record[key] for key in THOUGHT_KEYS if isinstance(record.get(key), str) and record[key].strip()), None
    )
    if thought:
        answer = think(clean(thought), answer)
    turns += ({"role": "user", "content": asked}, {"role": "assistant", "content": answer})
    return _with_system(record, turns)


def _asked_and_answered(record: dict, asked: str, answered: str) -> Piece:
    shape = f"{asked}/{answered}"
    if "label" in record and isinstance(record["label"], bool) and not record["label"]:
        raise Unusable("an answer that is labelled as bad")
    answer = record[answered]
    if isinstance(record[asked], list) and record[asked] and isinstance(record[asked][0], dict):  # turns
        turns, _ = read_turns(record[asked])
        answers = (
            read_turns(answer)[0] if isinstance(answer, list) else [{"role": "assistant", "content": clean(answer)}]
        )
        return Piece(shape, turns=_with_system(record, turns + answers))
    if isinstance(answer, dict):  # {"text": […]}, as SQuAD has it
        answer = answer.get("text") or answer.get("content")
        answer = answer[0] if isinstance(answer, list) and answer else answer
    question = clean(record[asked])
    context = record.get("context")
    if isinstance(context, str) and context.strip():
        question = f"{clean(context)}\n{question}"
    return Piece(shape, turns=_exchange(record, question, clean(answer)))


def _pair(record: dict) -> Piece:
    before: list[Turn] = []
    shape = "chosen/rejected"
    if (key := next((key for key in CHAT_KEYS if isinstance(record.get(key), list) and record[key]), None)) is not None:
        before, _ = read_turns(record[key])
    elif (key := _key(record, (*ASKED_KEYS, "instruction"))) is not None:
        shape = f"{key}, chosen, rejected"
        asked = record[key]
        if isinstance(asked, list):
            before, _ = read_turns(asked)
        elif clean(asked).strip():
            given = record.get("input") if key == "instruction" else None
            text = clean(asked) + (f"\n{clean(given)}" if isinstance(given, str) and given.strip() else "")
            before = [{"role": "user", "content": text}]
    if not before and isinstance(record["chosen"], str) and "\n\nHuman:" in f"\n\n{record['chosen']}":
        sides = [_spoken(record[key]) for key in ("chosen", "rejected")]
        shape = "chosen/rejected as spoken"
    else:
        sides = [_side(record[key]) for key in ("chosen", "rejected")]
    chats = [side if _begins(side, before) else before + side for side in sides]
    shared = 0
    while shared < min(map(len, chats)) and chats[0][shared] == chats[1][shared]:
        shared += 1
    turns, chosen, rejected = chats[0][:shared], chats[0][shared:], chats[1][shared:]
    if chats[0] == chats[1]:
        raise Unusable("two identical answers")
    if not turns or not all(side and side[0]["role"] == "assistant" for side in (chosen, rejected)):
        raise Unusable("two answers that do not share one prompt")
    return Piece(shape, turns=_with_system(record, turns), chosen=chosen, rejected=rejected)


def _side(value: object) -> list[Turn]:
    if isinstance(value, dict):
        value = [value]
    if isinstance(value, list) and value and isinstance(value[0], dict):
        return read_turns(value)[0]
    return [{"role": "assistant", "content": clean(value)}]


def _begins(chat: list[Turn], before: list[Turn]) -> bool:
    return bool(before) and [turn["content"] for turn in chat[: len(before)]] == [turn["content"] for turn in before]


def _spoken(text: str) -> list[Turn]:
    """A chat as plain text, as in the HH-RLHF data: "\\n\\nHuman: …\\n\\nAssistant: …"."""
    turns = []
    for part in f"\n\n{text}".replace("\n\nHuman:", "\0u").replace("\n\nAssistant:", "\0a").split("\0")[1:]:
        turns.append({"role": "user" if part[0] == "u" else "assistant", "content": clean(part[1:]).strip()})
    return turns


def nested_records(record: dict) -> list[dict] | None:
    """The records of an object that only wraps them, {"data": [{…}, …]}; None if it is a record itself."""
    lists = [record[key] for key in NESTED_KEYS if isinstance(record.get(key), list) and record[key]]
    if len(lists) == 1 and all(isinstance(one, dict) for one in lists[0]):
        return lists[0]
    return None


Reader = Callable[[dict], Piece]
