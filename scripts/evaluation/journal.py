"""A model's answers so far, in a file beside the results: an interrupted run continues from there."""

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path

from lm_eval.api.instance import Instance
from lm_eval.api.model import LM

from trainer.errors import UserError


class Journal:
    """A file of JSON lines, one per request, written when it is answered; the harness's cache hook.

    Args:
        path: the file; its lines are used again, except a last one that a kill has truncated.
        model: identifies the weights and the tokenizer; a request's key is a hash of it and the texts.
    """

    def __init__(self, path: Path, model: str):
        self.path = path
        self.model = model
        self.known: dict[str, list] = {}
        lines = path.read_bytes().split(b"\n") if path.is_file() else [b""]
        for line in lines:
            try:
                entry = json.loads(line)
                self.known[entry["key"]] = entry["value"]
            except (ValueError, LookupError, TypeError):
                continue
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115 - open as long as the run
        except OSError as error:
            raise UserError(f"cannot write {path}: {error.strerror}") from None
        if lines[-1]:
            self._file.write("\n")

    def key(self, method: str, arguments: Sequence) -> str:
        content = json.dumps([self.model, method, [*arguments]], sort_keys=True)
        return hashlib.sha256(content.encode(errors="surrogatepass")).hexdigest()[:32]

    def add_partial(self, method: str, arguments: Sequence, value: Sequence) -> None:
        """Record a model's answer; it has been passed to the operating system when this returns."""
        entry = {"key": self.key(method, arguments), "value": [*value]}
        self._file.write(json.dumps(entry) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


class Resumed:
    """A model of the harness that gets only the requests that its journal has no answer to.

    Args:
        told: called with the number of answered requests and of all requests.
    """

    def __init__(self, lm: LM, journal: Journal, told: Callable[[int, int], None]):
        self.lm = lm
        self.journal = journal
        self.told = told
        lm.set_cache_hook(journal)

    def __getattr__(self, name: str):
        return getattr(self.lm, name)

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        keys = [self.journal.key("loglikelihood", request.args) for request in requests]
        new = [number for number, key in enumerate(keys) if key not in self.journal.known]
        if len(new) < len(keys):
            self.told(len(keys) - len(new), len(keys))
        found = dict(zip(new, self.lm.loglikelihood([requests[i] for i in new]) if new else (), strict=True))
        return [found[i] if i in found else tuple(self.journal.known[key]) for i, key in enumerate(keys)]
