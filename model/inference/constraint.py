"""The interface of constraints on an answer's text: which tokens may come next, and how to end in time.

The engine knows only this interface; `scripts.serving.grammars` makes constraints from JSON schemas.
"""

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor


class ConstrainedText(Protocol):
    """The state of one answer's text under its constraint."""

    @property
    def whole(self) -> bool:
        """Whether the text may end here."""

    @property
    def finished(self) -> bool:
        """Whether it must end here."""

    def allowed(self) -> np.ndarray:
        """The tokens that may come next, including the end token if the text is complete: uint8 (bytes,), one bit per
        token, the lowest bit of a byte first."""

    def settle(self, token: int, left: int) -> int:
        """The token to append instead of an allowed one that was sampled: the same, unless the text could then not be
        completed within the `left` tokens of the answer, this one included."""

    def take(self, token: int) -> None:
        """Append a token."""


class Constraint(Protocol):
    """A form that an answer must have. May be shared by requests, and used from any thread."""

    def begin(self) -> ConstrainedText:
        """The state of an answer without tokens."""


def unpacked(allowed: np.ndarray, vocabulary: int) -> np.ndarray:
    """Which tokens may come next, from what `ConstrainedText.allowed` says: (texts, bytes) uint8 -> (texts, vocabulary)
    bool. A token without a bit may not."""
    bits = np.unpackbits(allowed, axis=1, count=min(vocabulary, 8 * allowed.shape[1]), bitorder="little")
    return np.pad(bits, ((0, 0), (0, vocabulary - bits.shape[1]))).view(bool)


def only_allowed(logits: Tensor, texts: Sequence[ConstrainedText]) -> Tensor:
    """The logits (texts, vocab) with -inf for tokens that must not follow each text."""
    allowed = unpacked(np.stack([text.allowed() for text in texts]), logits.size(1))
    return logits.masked_fill(~torch.from_numpy(allowed).to(logits.device), float("-inf"))
