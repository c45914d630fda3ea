"""What has been found out about a model, kept beside the weights: it is not computed again."""

import hashlib
import json
from pathlib import Path

from trainer.files import save_json


class Kept:
    """One json per model. Each result is written as soon as it is known, so that an interrupted run continues from it.

    Args:
        path: the json; one that is damaged, or not of these weights, counts as empty.
        weights: tells the weights from others.
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
        """The result of a part of the report; None where it is not known, or was of another question."""
        known = self.content["parts"].get(part, {})
        return known["found"] if known.get("asked") == digest(asked) else None

    def put(self, part: str, asked: object, found: dict) -> None:
        """Keep it; on the disk when this returns."""
        self.content["parts"][part] = {"asked": digest(asked), "found": found}
        save_json(self.content, self.path)


def digest(asked: object) -> str:
    """A short hash of the JSON values that identify an evaluation."""
    text = json.dumps(asked, sort_keys=True)
    return hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()[:16]
