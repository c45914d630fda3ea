"""--map: the meaning of a record's keys if its format is unknown."""

from scripts.preparing.record_shapes import Piece, Turn, Unusable, clean, read_turns, think
from trainer.errors import UserError

TARGETS = ("text", "system", "user", "assistant", "thought", "chosen", "rejected", "turns", "role", "content")
WHOLE = ({"text"}, {"user", "assistant"}, {"user", "chosen", "rejected"}, {"turns", "role", "content"})


def parse_map(spec: str) -> dict[str, tuple[str, ...]]:
    """ "user=question+context assistant=answer" as the keys of each part.

    Raises:
        UserError: an unknown part, or an incomplete record.
    """
    found = {}
    for word in spec.split():
        target, sign, keys = word.partition("=")
        if not sign or target not in TARGETS or not all(keys.split("+")):
            raise UserError(
                f'--map: {word!r} is not PART=KEY, with PART one of {", ".join(TARGETS)} ("user=q assistant=a")'
            )
        found[target] = tuple(keys.split("+"))
    if not any(parts <= found.keys() for parts in WHOLE):
        wanted = "; ".join(" and ".join(sorted(parts)) for parts in WHOLE)
        raise UserError(f"--map {spec!r} does not describe a whole record: it needs {wanted}")
    return found


def mapped(record: dict, keys: dict[str, tuple[str, ...]]) -> Piece:
    """The content of a record, by the keys that the user named.

    Raises:
        Unusable: one of them is missing.
    """
    if "turns" in keys:
        turns = _value(record, keys["turns"][0])
        if not isinstance(turns, list):
            raise Unusable(f'no list at the key "{keys["turns"][0]}" of --map')
        renamed = [
            {"role": _value(turn, keys["role"][0]), "content": _value(turn, keys["content"][0])} for turn in turns
        ]
        return Piece("--map", turns=_system(record, keys) + read_turns(renamed)[0])
    if "text" in keys:
        return Piece("--map", text=_text(record, keys["text"]))
    before = [*_system(record, keys), {"role": "user", "content": _text(record, keys["user"])}]
    if "chosen" in keys:
        chosen, rejected = ([_answer(_text(record, keys[side]))] for side in ("chosen", "rejected"))
        return Piece("--map", turns=before, chosen=chosen, rejected=rejected)
    answer = _text(record, keys["assistant"])
    if "thought" in keys and (thought := _text(record, keys["thought"])).strip():
        answer = think(thought, answer)
    return Piece("--map", turns=[*before, _answer(answer)])


def _answer(text: str) -> Turn:
    return {"role": "assistant", "content": text}


def _system(record: dict, keys: dict[str, tuple[str, ...]]) -> list[Turn]:
    text = _text(record, keys["system"]) if "system" in keys else ""
    return [{"role": "system", "content": text}] if text.strip() else []


def _text(record: dict, keys: tuple[str, ...]) -> str:
    texts = (clean(_value(record, key)) for key in keys)
    return "\n".join(text for text in texts if text.strip() or len(keys) == 1)


def _value(record: object, path: str):
    """The value under a key, or under nested keys such as "data.question"."""
    if isinstance(record, dict) and path in record:
        return record[path]
    for key in path.split("."):
        if not isinstance(record, dict) or key not in record:
            raise Unusable(f'no key "{path}", which --map names')
        record = record[key]
    return record
