"""What an answer's text may be, where not everything will do: the next tokens that fit, and a way to the end in time.

The engine knows of a constraint only what stands here; `scripts.serving.grammars` makes them from JSON schemas.
"""

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor


class ConstrainedText(Protocol):
    """An answer's text so far, against its constraint. Belongs to one answer."""

    @property
    def whole(self) -> bool:
        """Whether the text may end here."""

    @property
    def finished(self) -> bool:
        """Whether it must end here."""

    def allowed(self) -> np.ndarray:
        """The tokens that may come next, the end token where the text is whole: (bytes,) uint8, a bit for each token,
        the lowest one of a byte first."""

    def settle(self, token: int, left: int) -> int:
        """The token that is written in place of an allowed one that was sampled: the same, unless the text could not be
        ended any more within the `left` tokens of the answer, this one included."""

    def take(self, token: int) -> None:
        """Go on by a token."""


class Constraint(Protocol):
    """A form that an answer must have. May be shared by requests, and used from any thread."""

    def begin(self) -> ConstrainedText:
        """An answer's text that has no token yet."""


def unpacked(allowed: np.ndarray, vocabulary: int) -> np.ndarray:
    """Which tokens may come next, from what `ConstrainedText.allowed` says: (texts, bytes) uint8 -> (texts, vocabulary)
    bool. A token without a bit may not."""
    bits = np.unpackbits(allowed, axis=1, count=min(vocabulary, 8 * allowed.shape[1]), bitorder="little")
    return np.pad(bits, ((0, 0), (0, vocabulary - bits.shape[1]))).view(bool)


def only_allowed(logits: Tensor, texts: Sequence[ConstrainedText]) -> Tensor:
    """The logits (texts, vocab) with -inf for what must not follow each text."""
    allowed = unpacked(np.stack([text.allowed() for text in texts]), logits.size(1))
    return logits.masked_fill(~torch.from_numpy(allowed).to(logits.device), float("-inf"))
