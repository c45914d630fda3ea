"""Models of the harness that compute nothing."""

import random

from lm_eval.api.instance import Instance
from lm_eval.api.model import LM


class Fake(LM):
    """Likes each option as much as `likes(its request)` says."""

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        return [(self.likes(request), False) for request in requests]

    def loglikelihood_rolling(self, requests):
        raise NotImplementedError

    def generate_until(self, requests):
        raise NotImplementedError


class Omniscient(Fake):
    """Knows by what a file says beside the options, or, of an option as text, by how it begins."""

    def likes(self, request: Instance) -> float:
        letter = request.doc.get("Answer") or (request.doc.get("answer") if "A" in request.doc else None)
        right = letter == "ABCD"[request.idx] if letter else request.args[1].strip().startswith("right")
        return -1.0 if right else -2.0


class Guessing(Fake):
    """Knows nothing; guesses by its seed."""

    def __init__(self, seed: int):
        super().__init__()
        self.random = random.Random(seed)

    def likes(self, request: Instance) -> float:
        return -self.random.random()
