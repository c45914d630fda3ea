"""Stored results of a model's evaluation, beside the weights, so that they are not computed again."""

import hashlib
import json
from pathlib import Path

from trainer.files import save_json


class Kept:
    """One json per model. Each result is written as soon as it is known, so that an interrupted run continues from it.

    Args:
        path: the json; if it is damaged, or belongs to other weights, it counts as empty.
        weights: identifies the weights.
    """

    def __init__(self, path: Path, weights: str):
        self.path = path
        self.content = {"weights": weights, "parts": {}}
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            whole = all(part.keys() >= {"asked", "found"} for part in content["parts"].values())
            if whole and content["weights"] == weights:
                self.content = content
        except (OSError, ValueError, LookupError, TypeError, AttributeError):
            pass

    def get(self, part: str, asked: object) -> dict | None:
        """The result of a part of the evaluation; None if it is unknown or belongs to other inputs."""
        known = self.content["parts"].get(part, {})
        return known["found"] if known.get("asked") == digest(asked) else None

    def put(self, part: str, asked: object, found: dict) -> None:
        """Store a result; it is on disk when this returns."""
        self.content["parts"][part] = {"asked": digest(asked), "found": found}
        save_json(self.content, self.path)


def digest(asked: object) -> str:
    """A short hash of the JSON values that identify an evaluation."""
    text = json.dumps(asked, sort_keys=True)
    return hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()[:16]
