"""The number of tokens of lines as in training: with the chat template and the system prompt."""

from functools import cache

import numpy as np


@cache
def _tokenizer(folder: str | None):
    from trainer.weights import load_tokenizer

    return load_tokenizer(folder)


def count_tokens(records: list[dict], stage: str, tokenizer: str | None) -> np.ndarray:
    """The number of tokens in each line, int64 (n,); for a pair that of its longer side.

    Raises:
        UserError: there is no such tokenizer.
    """
    from model.chat import render_chats, render_text

    loaded = _tokenizer(tokenizer)
    if stage in ("pretrain", "tokenizer"):
        return np.array([len(ids) for ids in render_text(loaded, (record["text"] for record in records))], np.int64)
    if stage == "dpo":
        sides = [
            [len(ids) for ids, _ in render_chats(loaded, [r[key] for r in records])] for key in ("chosen", "rejected")
        ]
        return np.array(sides, np.int64).reshape(2, -1).max(axis=0)
    chats = [record["conversations"] for record in records]
    return np.array([len(ids) for ids, _ in render_chats(loaded, chats)], np.int64)
