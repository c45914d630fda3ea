"""Fake models for the harness."""

import random

from lm_eval.api.instance import Instance
from lm_eval.api.model import LM


class Fake(LM):
    """Gives each option the log-likelihood `likes(its request)`."""

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        return [(self.likes(request), False) for request in requests]

    def loglikelihood_rolling(self, requests):
        raise NotImplementedError

    def generate_until(self, requests):
        raise NotImplementedError


class Omniscient(Fake):
    """Knows every answer: from the file's other fields, or from how the text of an option begins."""

    def likes(self, request: Instance) -> float:
        letter = request.doc.get("Answer") or (request.doc.get("answer") if "A" in request.doc else None)
        right = letter == "ABCD"[request.idx] if letter else request.args[1].strip().startswith("right")
        return -1.0 if right else -2.0


class Guessing(Fake):
    """Knows nothing and guesses, by its seed."""

    def __init__(self, seed: int):
        super().__init__()
        self.random = random.Random(seed)

    def likes(self, request: Instance) -> float:
        return -self.random.random()
