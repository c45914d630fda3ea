"""The formats of data lines: each function takes a line's JSON object, checks it and returns its content.

No key of a line is silently ignored, see `dataset.record_keys`.
"""

from typing import Any

from dataset.jsonl import BadRecord, Ignored
from dataset.record_keys import (
    CHAT,
    OTHER_PROMPTS,
    PAIR,
    PICTURES,
    QUESTION,
    TEXT,
    TURN,
    Keys,
    looks_like,
    string_at,
    value_at,
)
from dataset.shapes import foreign_turn
from dataset.tool_records import (
    OTHER_RESULT_ROLES,
    RESULT_ROLES,
    read_calls,
    read_tools,
    says_nothing,
    settle,
    uses_tools,
)
from model.chat import IMAGE_MARKER, ROLES
from model.reasoning import thought_before_calls, with_thought

OTHER_NAMES = {"human": "user", "gpt": "assistant", "bot": "assistant", "model": "assistant", "developer": "system"}

Turn = dict[str, Any]  # "role", "content", "weight": 0 if an answer is not trained on, "tool_calls"; the first: "tools"
Turns = list[Turn]
Pair = tuple[Turns, Turns]  # chosen, rejected


def parse_text(record: dict, ignored: Ignored) -> str:
    """The text of a pretraining record `{"text": "…"}`.

    Raises:
        BadRecord: the key is missing, not a string, only white space, or not encodable.
    """
    TEXT.check(record, ignored)
    text = string_at(record, "text")
    if not text.removeprefix("<s>").removesuffix("</s>").strip():
        raise BadRecord('"text" is empty')
    return text


def parse_chat(record: dict, ignored: Ignored) -> Turns:
    """The chat of a record `{"conversations": [{"role", "content"}, …]}`, every turn with its role.

    A turn without a role is the user's, or the assistant's if the turn before it was the user's. A system turn may only
    come first; the record's "system" is one. An answer may have a separate thought, "reasoning_content", and "weight" 0
    or "train" false if it is not to be trained on. It may call tools; the available tools are then in the first turn,
    "tools", see `dataset.tool_records`.

    Raises:
        BadRecord: not such a list, an unknown role, content that is not a string, an empty answer, no answer to train
            on, calls and results that do not match, or a refused key.
    """
    return _chat(record, CHAT, ignored)


def parse_image_chat(record: dict, ignored: Ignored) -> tuple[list[str], Turns]:
    """The image names and the chat of a VLM record `{"image": …, "conversations": […]}`.

    "image" is "a.jpg", or "a.jpg,b.jpg", or a list of names; absent, null or empty for text only.

    Raises:
        BadRecord: as in `parse_chat`; "image" is something else, or the chat has fewer `<image>` markers than images.
    """
    names = record.get("image")
    if names is None or isinstance(names, str):
        names = names.split(",") if names else []
    if not isinstance(names, list) or not all(isinstance(name, str) and name.strip() for name in names):
        raise BadRecord('"image" must be a name, comma-separated names, or a list of names')
    chat = _chat(record, PICTURES, ignored)
    if uses_tools(chat):
        raise BadRecord("it uses tools, which the stages with pictures do not learn")
    markers = sum(turn["content"].count(IMAGE_MARKER) for turn in chat)
    if markers < len(names):
        raise BadRecord(f"{len(names)} images, but only {markers} {IMAGE_MARKER} markers")
    return [name.strip() for name in names], chat


def parse_pair(record: dict, ignored: Ignored) -> Pair:
    """The two chats of a preference record `{"chosen": …, "rejected": …}`.

    Both are equal up to a turn that the assistant answers differently; answers before it are not targets: they have
    "weight" 0. With a "prompt", a list of turns or a user's text that precedes both, the two may be lists of turns that
    continue or repeat it, or texts of the assistant.

    Raises:
        BadRecord: as in `parse_chat`; or they differ before an answer, and so do not answer the same prompt.
    """
    PAIR.check(record, ignored)
    prompt = _prompt(record, ignored)
    chosen, rejected = (_with_system(record, _side(record, key, prompt, ignored)) for key in ("chosen", "rejected"))
    shared = 0
    while shared < min(len(chosen), len(rejected)) and _same(chosen[shared], rejected[shared]):
        shared += 1
    if shared == len(chosen) == len(rejected):
        shared -= 1  # two equal chats: the last answer, from which there is nothing to learn
    if any(chat[shared:] == [] or chat[shared]["role"] != "assistant" for chat in (chosen, rejected)):
        raise BadRecord(f'"chosen" and "rejected" are not two answers to one prompt: they diverge at turn {shared + 1}')
    for key, chat in (("chosen", chosen), ("rejected", rejected)):
        if not any(_is_learned(turn) for turn in chat[shared:]):
            raise BadRecord(f'"{key}" has no answer to train on after the two diverge')
    given = [turn | {"weight": 0} if turn["role"] == "assistant" else turn for turn in chosen[:shared]]
    tools = read_tools(record)
    return settle(given + chosen[shared:], tools, "chosen"), settle(given + rejected[shared:], tools, "rejected")


def parse_question(record: dict, ignored: Ignored) -> Turns:
    """The prompt of a record as a chat: its `"question"`, or its chat up to the last user turn.

    Raises:
        BadRecord: neither key, a faulty chat (see `parse_chat`), or one without a question.
    """
    if "question" in record:
        QUESTION.check(record, ignored)
        chat = [{"role": "user", "content": string_at(record, "question")}]
    elif "conversations" in record:
        CHAT.check(record, ignored)
        chat = _turns(record, "conversations", ignored)
        asked = next((n for n in range(len(chat), 0, -1) if chat[n - 1]["role"] == "user"), 0)
        if asked < len(chat):
            ignored["turns after the question"] += len(chat) - asked
        chat = chat[:asked]
        _check_answers(chat, "conversations")
        _check_beginning(record, chat, ignored)
    else:
        raise BadRecord('it has neither "question" nor "conversations"' + looks_like(record))
    if not chat or not chat[-1]["content"].strip():
        raise BadRecord("it contains no question")
    return settle(_with_system(record, chat), read_tools(record), "conversations")


def _chat(record: dict, keys: Keys, ignored: Ignored) -> Turns:
    keys.check(record, ignored)
    chat = _turns(record, "conversations", ignored)
    _check_answers(chat, "conversations")
    _check_has_answer(chat, "conversations")
    _check_beginning(record, chat, ignored)
    return settle(_with_system(record, chat), read_tools(record), "conversations")


def _turns(record: dict, key: str, ignored: Ignored, roles_given: bool = False) -> Turns:
    """The turns under a key, before their answers are checked; with `roles_given` each must give its role."""
    turns = value_at(record, key, list, "a list")
    if not turns:
        raise BadRecord(f'"{key}" is empty')
    chat: Turns = []
    for number, turn in enumerate(turns, 1):
        try:
            if roles_given and isinstance(turn, dict) and "role" not in turn:
                raise BadRecord('the key "role" is missing, which a turn needs beside a "prompt"')
            chat.append(_turn(turn, chat, ignored))
        except BadRecord as fault:
            raise BadRecord(f'turn {number} of "{key}": {fault}') from fault
    return chat


def _turn(turn: object, before: Turns, ignored: Ignored) -> Turn:
    """A turn in the form in which it is rendered; `before` holds the turns before it."""
    if not isinstance(turn, dict):
        raise BadRecord("not an object")
    if shape := foreign_turn(turn):
        raise BadRecord(shape)
    TURN.check(turn, ignored, " (turn)")
    role = turn.get("role")
    if role is None:
        role = "assistant" if before and before[-1]["role"] in ("user", "tool") else "user"
    role = RESULT_ROLES.get(role, role) if isinstance(role, str) else role
    if role not in ROLES:
        raise BadRecord(_why_no_role(role))
    if role == "system" and before:
        raise BadRecord("a system turn can only come first")
    answers = role == "assistant"
    tools = _tools_of(turn, role)
    content = "" if tools.get("tool_calls") and turn.get("content") is None else string_at(turn, "content")
    thought = _thought(turn)
    if thought and not answers:
        raise BadRecord('only the assistant\'s turns can have "reasoning_content"')
    if thought and (content.strip() or tools):  # an answer that is empty stays so, thought or not
        try:
            content = with_thought(thought, content) if content.strip() else thought_before_calls(thought)
        except ValueError as fault:
            raise BadRecord(str(fault)) from fault
    wanted = _wanted(turn)
    if wanted and not answers:
        raise BadRecord(f"only the assistant's turns can be trained on, not a {role} turn")
    return {"role": role, "content": content} | ({"weight": 0} if answers and wanted is False else {}) | tools


def _tools_of(turn: dict, role: str) -> Turn:
    """A turn's list of tools, its calls, or the id of the call whose result it is."""
    found: Turn = {}
    for key, speaker, said in (
        ("tools", "system", read_tools(turn)),
        ("tool_calls", "assistant", read_calls(turn)),
        ("tool_call_id", "tool", turn.get("tool_call_id")),
    ):
        if not says_nothing(said):
            if role != speaker:
                raise BadRecord(f'only a turn of the role "{speaker}" can have "{key}"')
            found[key] = said
    return found


def _why_no_role(role: object) -> str:
    told = f"unknown role {role!r:.40}"
    if role in OTHER_RESULT_ROLES:
        return f'{told}: use "tool"'
    if isinstance(role, str) and (name := OTHER_NAMES.get(role.lower(), role.lower())) in ROLES:
        return f'{told}: use "{name}"'
    return f"{told}: use {', '.join(ROLES)}"


def _thought(turn: dict) -> str:
    """A turn's "reasoning_content"; empty if it is absent, null or only white space."""
    if turn.get("reasoning_content") is None:
        return ""
    thought = string_at(turn, "reasoning_content")
    return thought if thought.strip() else ""


def _wanted(turn: dict) -> bool | None:
    """Whether a turn is trained on, according to its "weight" or "train"; None if it has neither."""
    weight, train = turn.get("weight"), turn.get("train")
    if weight is not None and (isinstance(weight, bool) or not isinstance(weight, int | float) or weight not in (0, 1)):
        raise BadRecord(f'"weight" is {weight!r:.40}, but must be 0 or 1')
    if train is not None and not isinstance(train, bool):
        raise BadRecord(f'"train" is {train!r:.40}, but must be true or false')
    said = {bool(word) for word in (weight, train) if word is not None}
    if len(said) > 1:
        raise BadRecord('"weight" and "train" contradict each other')
    return said.pop() if said else None


def _is_learned(turn: Turn) -> bool:
    return turn["role"] == "assistant" and turn.get("weight", 1) != 0


def _check_answers(chat: Turns, key: str) -> None:
    for number, turn in enumerate(chat, 1):
        if _is_learned(turn) and not turn["content"].strip() and not turn.get("tool_calls"):
            raise BadRecord(f'turn {number} of "{key}": an empty answer would train the model to stop at once')


def _check_has_answer(chat: Turns, key: str) -> None:
    if not any(map(_is_learned, chat)):
        left = ' to train on: each has "weight" 0' if any(turn["role"] == "assistant" for turn in chat) else ""
        raise BadRecord(f'"{key}" has no assistant turn{left}')


def _check_beginning(record: dict, chat: Turns, ignored: Ignored) -> None:
    """Check that a "prompt" beside a chat only repeats the chat's beginning."""
    prompt = _prompt(record, ignored)
    if not _begins_with(chat, prompt):
        raise BadRecord('the key "prompt" is refused: "conversations" does not begin with it')


def _prompt(record: dict, ignored: Ignored) -> Turns:
    """The turns of "prompt", of which the last is a user's; none if it is absent or null."""
    prompt = record.get("prompt")
    if prompt is None:
        return []
    if isinstance(prompt, str):
        turns = [{"role": "user", "content": string_at(record, "prompt")}]
    elif isinstance(prompt, list):
        turns = _turns(record, "prompt", ignored)
        _check_answers(turns, "prompt")
    else:
        raise BadRecord('"prompt" is neither a string nor a list of turns')
    if turns[-1]["role"] != "user":
        raise BadRecord('"prompt" does not end with a user turn')
    if not turns[-1]["content"].strip():
        raise BadRecord('"prompt" is empty')
    return turns


def _side(record: dict, key: str, prompt: Turns, ignored: Ignored) -> Turns:
    """The whole chat of "chosen" or "rejected", including the prompt."""
    if isinstance(record.get(key), str):
        if not prompt:
            raise BadRecord(f'"{key}" is a text without a "prompt" that it answers')
        chat = [{"role": "assistant", "content": string_at(record, key)}]
    else:
        chat = _turns(record, key, ignored, roles_given=bool(prompt))
    _check_answers(chat, key)
    _check_has_answer(chat, key)
    if chat[0]["role"] == "assistant":
        other = next((name for name in OTHER_PROMPTS if not says_nothing(record.get(name))), None)
        if other and not prompt:
            raise BadRecord(f'the key "{other}" is refused: the key for the turns that both answer is "prompt"')
        return prompt + chat
    if not _begins_with(chat, prompt):
        raise BadRecord(f'"{key}" begins neither with an answer nor with the "prompt"')
    return chat


def _begins_with(chat: Turns, prompt: Turns) -> bool:
    """Whether the chat begins with the prompt's turns; a system turn that only the chat has is ignored."""
    if prompt and prompt[0]["role"] != "system" and chat and chat[0]["role"] == "system":
        chat = chat[1:]
    return len(chat) >= len(prompt) and all(map(_same, chat, prompt))


def _same(turn: Turn, other: Turn) -> bool:
    return all(turn.get(name) == other.get(name) for name in ("role", "content", "tool_calls"))


def _with_system(record: dict, chat: Turns) -> Turns:
    """The chat with the record's "system", if any, as its system turn."""
    if record.get("system") is None:
        return chat
    system = {"role": "system", "content": string_at(record, "system")}
    if chat[0]["role"] != "system":
        return [system, *chat]
    if not _same(system, chat[0]):
        raise BadRecord('"system" differs from the chat system turn')
    return chat
