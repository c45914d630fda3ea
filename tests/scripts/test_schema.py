"""The bounds of each field of a request: what lies at them is taken, what lies beyond them is refused by name."""

import math

import pytest
from pydantic import ValidationError

from scripts.serving.schema import ChatRequest, CompletionRequest

TALK = {"messages": [{"role": "user", "content": "Hi"}]}
TOOL = {"type": "function", "function": {"name": "f"}}
BOTH = [
    ("temperature", (0, 2), (-0.01, 2.01, math.nan)),
    ("top_p", (1e-9, 1), (0, 1.01, math.nan)),
    ("top_k", (-1, 0, 9999), (-2,)),
    ("repetition_penalty", (0.01, 10), (0, 10.1, math.inf)),
    ("frequency_penalty", (-2, 2), (-2.1, 2.1, math.nan)),
    ("presence_penalty", (-2, 2), (-2.1, 2.1, math.nan)),
    ("n", (1, 16), (0, 17)),
    ("stop", ("x", "x" * 1000, [], ["x"] * 16), ("", "x" * 1001, ["x"] * 17, ["x", ""])),
]
CHATS = [
    ("messages", (TALK["messages"],), ([],)),
    ("max_tokens", (-1, 1, 10**6), (-2, 0)),
    ("max_completion_tokens", (-1, 1, 10**6), (-2, 0)),
    ("top_logprobs", (0, 20), (-1, 21)),
    ("tools", ([TOOL] * 128,), ([TOOL] * 129,)),
    ("functions", ([{"name": "f"}] * 128,), ([{"name": "f"}] * 129,)),
]
COMPLETIONS = [
    ("max_tokens", (-1, 0, 10**6), (-2,)),
    ("logprobs", (0, 20, False), (-1, 21, True)),
    ("prompt", ("", "x", [1], ["x"] * 64, [[1]] * 64), (["x"] * 65, [[1]] * 65)),
]


@pytest.mark.parametrize(
    ("kind", "always", "field", "taken", "refused"),
    [
        *((ChatRequest, TALK | {"logprobs": True}, *bounds) for bounds in (*BOTH, *CHATS)),
        *((CompletionRequest, {}, *bounds) for bounds in (*BOTH, *COMPLETIONS)),
    ],
    ids=lambda value: getattr(value, "__name__", value if isinstance(value, str) else ""),
)
def test_the_bounds_of_a_field(kind, always, field, taken, refused):
    for value in taken:
        kind.model_validate(always | {field: value})
    for value in refused:
        with pytest.raises(ValidationError, match=field):
            kind.model_validate(always | {field: value})
