"""The progress of a run."""

import time
from dataclasses import dataclass

from trainer.errors import UserError
from trainer.runtime import Totals

SKIPPED_LIMIT = 10  # steps in a row; float16's scaler needs a few of them to find its scale


@dataclass
class Progress:
    """Progress of a run: optimizer steps, non-padding tokens seen, seconds of training, steps skipped as not finite."""

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    skipped: int = 0

    def __post_init__(self):
        self._counted_at = time.monotonic()
        self._skipped_in_a_row = 0

    def advance(self, totals: Totals, skipped: bool) -> None:
        """Count the step just taken, or `skipped` because its loss or gradient was not finite.

        Raises:
            UserError: after several in a row that were skipped.
        """
        now = time.monotonic()
        self.step += 1
        self.tokens += int(totals.non_padding_tokens)
        self.seconds += now - self._counted_at
        self._counted_at = now
        if not skipped:
            self._skipped_in_a_row = 0
            return
        self.skipped += 1
        self._skipped_in_a_row += 1
        if self._skipped_in_a_row >= SKIPPED_LIMIT:
            raise UserError(
                f"loss or gradient was not finite {SKIPPED_LIMIT} times in a row; the last checkpoint is intact: "
                "continue from it with --resume and a lower --learning_rate, or another --dtype"
            )
