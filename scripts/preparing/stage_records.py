"""A stage's lines: built from a record's content, and taken apart again for the filters."""

import re

from scripts.preparing.record_shapes import Piece, Turn, Unusable, think

STAGES = ("pretrain", "sft", "dpo", "reason", "tokenizer")
TEXT_STAGES = ("pretrain", "tokenizer")
TAG = re.compile(r"</?(?:think|answer)>")
THOUGHT_FIRST = re.compile(r"\s*<think>(.*?)</think>\s*(?:<answer>(.*?)</answer>\s*|(.*))", re.DOTALL)
WELL_FORMED = re.compile(
    r"<think>\n(?:(?!</?(?:think|answer)>).)+\n</think>\n<answer>\n(?:(?!</?(?:think|answer)>).)+\n</answer>", re.DOTALL
)


def build(piece: Piece, stage: str) -> dict:
    """A stage's line with the content of a record.

    Raises:
        Unusable: it has nothing that the stage trains on.
    """
    if stage in TEXT_STAGES:
        if piece.text is not None:
            return {"text": piece.text.removeprefix("<s>").removesuffix("</s>")}
        turns = (piece.turns or []) + (piece.chosen or [])
        return {"text": "\n".join(turn["content"] for turn in turns if turn["role"] != "system")}
    if piece.turns is None:
        raise Unusable(f"a plain text, but --stage {stage} needs chats")
    if stage == "dpo":
        if piece.chosen is None:
            raise Unusable("no pair of answers, which --stage dpo needs")
        return {"chosen": piece.turns + piece.chosen, "rejected": piece.turns + piece.rejected}
    turns = piece.turns + (piece.chosen or [])
    while turns and turns[-1]["role"] == "user":  # a question without an answer
        turns = turns[:-1]
    for turn in turns:
        if turn["role"] == "assistant" and "think>" in turn["content"]:
            turn["content"] = tidy_thought(turn["content"])
    return {"conversations": turns}


def tidy_thought(answer: str) -> str:
    """An answer that begins with a thought in tags, in our form; any other answer unchanged."""
    found = THOUGHT_FIRST.fullmatch(answer)
    if not found:
        return answer
    thought, rest = found[1], found[2] if found[2] is not None else found[3]
    if not thought.strip():  # as of models whose thinking is switched off
        return rest.strip()
    return think(thought, rest) or answer


def holders(record: dict) -> list[dict]:
    """The objects with a text each, under "text" or "content"; turns shared by two chats only once."""
    if "text" in record:
        return [record]
    if "conversations" in record:
        return record["conversations"]
    chosen, rejected = record["chosen"], record["rejected"]
    return chosen + [turn for turn in rejected if not any(turn is other for other in chosen)]


def key_of(holder: dict) -> str:
    return "text" if "text" in holder else "content"


def texts(record: dict) -> list[str]:
    """All texts of a line."""
    return [holder[key_of(holder)] for holder in holders(record)]


def whole_text(record: dict) -> str:
    """A line's text for comparison with other lines: without the system prompt, which many share."""
    if "text" in record:
        return record["text"]
    if "conversations" in record:
        return "\n".join([turn["content"] for turn in record["conversations"] if turn["role"] != "system"])
    chosen, rejected = record["chosen"], record["rejected"]
    shared = shared_turns(chosen, rejected)
    return "\n".join(turn["content"] for turn in chosen + rejected[shared:] if turn["role"] != "system")


def shared_turns(chosen: list[Turn], rejected: list[Turn]) -> int:
    """The number of equal turns at the beginning of two chats."""
    shared = 0
    while shared < min(len(chosen), len(rejected)) and chosen[shared] == rejected[shared]:
        shared += 1
    return shared


def questions(record: dict) -> str:
    """The text of a chat's user turns; empty for a plain text."""
    turns = record.get("conversations") or record.get("chosen") or []
    return "\n".join(turn["content"] for turn in turns if turn["role"] == "user")


def answers(record: dict) -> list[str]:
    """The texts that are trained on as answers."""
    if "text" in record:
        return []
    turns = record["conversations"] if "conversations" in record else record["chosen"] + record["rejected"]
    return [turn["content"] for turn in turns if turn["role"] == "assistant"]
