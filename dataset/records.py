"""What a line of a data file must hold: each function takes the line's JSON object, checks it, returns its content."""

from dataset.jsonl import BadRecord
from model.chat import IMAGE_MARKER

ROLES = ("system", "user", "assistant")

Turns = list[dict[str, str]]
Pair = tuple[Turns, Turns, int]  # chosen, rejected, how many answers they share


def text_of(record: dict) -> str:
    """The text of a pretraining record `{"text": "…"}`.

    Raises:
        BadRecord: key missing, not a string, nothing but whitespace, or not encodable.
    """
    text = _string(record, "text")
    if not text.removeprefix("<s>").removesuffix("</s>").strip():
        raise BadRecord('"text" is empty')
    return text


def chat_of(record: dict, key: str = "conversations") -> list[dict[str, str]]:
    """The chat of a record `{"conversations": [{"role", "content"}, …]}`, every turn with its role.

    A turn without a role is the user's, or the assistant's when the turn before it was the user's. A system turn may
    only come first.

    Raises:
        BadRecord: not such a list, an unknown role, content that is no string, or no answer to learn from.
    """
    chat = _turns(record, key)
    if not any(turn["role"] == "assistant" and turn["content"].strip() for turn in chat):
        raise BadRecord(f'"{key}" has no answer of the assistant')
    return chat


def question_of(record: dict) -> list[dict[str, str]]:
    """What to ask: the question of a record `{"question": "…"}`, or a chat up to its last user turn, as a chat.

    Raises:
        BadRecord: neither key, a chat as in `chat_of` that is faulty, or no question in it.
    """
    if "question" in record:
        chat = [{"role": "user", "content": _string(record, "question")}]
    elif "conversations" in record:
        chat = _turns(record, "conversations")
    else:
        raise BadRecord('it has neither "question" nor "conversations"')
    while chat and chat[-1]["role"] != "user":
        chat.pop()
    if not chat or not chat[-1]["content"].strip():
        raise BadRecord("there is no question in it")
    return chat


def _turns(record: dict, key: str) -> list[dict[str, str]]:
    turns = _value(record, key, list, "a list")
    if not turns:
        raise BadRecord(f'"{key}" is empty')
    chat: list[dict[str, str]] = []
    for number, turn in enumerate(turns, 1):
        try:
            chat.append(_turn(turn, chat))
        except BadRecord as fault:
            raise BadRecord(f'turn {number} of "{key}": {fault}') from fault
    return chat


def pair_of(record: dict) -> Pair:
    """The two chats of a preference record `{"chosen": […], "rejected": […]}`, and how many answers they share.

    Both go the same way up to a turn that the assistant answers differently.

    Raises:
        BadRecord: as of `chat_of`; or they part before an answer does, and so do not answer one prompt.
    """
    chosen, rejected = chat_of(record, "chosen"), chat_of(record, "rejected")
    shared = 0
    while shared < min(len(chosen), len(rejected)) and chosen[shared] == rejected[shared]:
        shared += 1
    if shared == len(chosen) == len(rejected):
        shared -= 1  # two equal chats: the last answer, from which there is nothing to learn
    if any(chat[shared:] == [] or chat[shared]["role"] != "assistant" for chat in (chosen, rejected)):
        raise BadRecord(f'"chosen" and "rejected" are no two answers to one prompt: they part at turn {shared + 1}')
    return chosen, rejected, sum(turn["role"] == "assistant" for turn in chosen[:shared])


def _turn(turn: object, before: list[dict[str, str]]) -> dict[str, str]:
    """A turn as {"role", "content"}; `before` holds the turns that came ahead of it."""
    if not isinstance(turn, dict):
        raise BadRecord("not an object")
    role = turn.get("role")
    if role is None:
        role = "assistant" if before and before[-1]["role"] == "user" else "user"
    if role not in ROLES:
        raise BadRecord(f"unknown role {role!r:.40}")
    if role == "system" and before:
        raise BadRecord("a system turn can only come first")
    return {"role": role, "content": _string(turn, "content")}


def _value(record: dict, key: str, kind: type, kind_name: str):
    if key not in record:
        raise BadRecord(f'the key "{key}" is missing')
    if not isinstance(record[key], kind):
        raise BadRecord(f'"{key}" is not {kind_name}')
    return record[key]


def _string(record: dict, key: str) -> str:
    text = _value(record, key, str, "a string")
    try:
        text.encode()
    except UnicodeEncodeError as error:  # JSON can spell half a character, "\ud83d", which no tokenizer takes
        raise BadRecord(f'"{key}" holds half a character (a lone surrogate)') from error
    return text


def picture_chat_of(record: dict) -> tuple[list[str], list[dict[str, str]]]:
    """The image names and the chat of a VLM record `{"image": …, "conversations": […]}`.

    "image" is "a.jpg", or "a.jpg,b.jpg", or a list of names; absent, null or empty for text alone.

    Raises:
        BadRecord: as of `chat_of`; "image" is something else, or the chat has fewer `<image>` markers than images.
    """
    names = record.get("image") or []
    if isinstance(names, str):
        names = names.split(",")
    if not isinstance(names, list) or not all(isinstance(name, str) and name.strip() for name in names):
        raise BadRecord('"image" is not a name, names with commas between them, or a list of names')
    chat = chat_of(record)
    markers = sum(turn["content"].count(IMAGE_MARKER) for turn in chat)
    if markers < len(names):
        raise BadRecord(f"images: {len(names)}, but {IMAGE_MARKER} markers to show them at: {markers}")
    return [name.strip() for name in names], chat
