"""From generated tokens to text: whole characters only, cut before the first stop string."""

from collections import deque
from collections.abc import Sequence

from model.inference.request import Token
from model.tokenizer import StreamDecoder


class Detokenizer:
    """From tokens to text: whole characters only, cut before the first stop string."""

    def __init__(self, table: Sequence[bytes], stop: Sequence[str]):
        self._decoder = StreamDecoder(table)
        self._stop = tuple(stop)
        self._held = ""  # text that may become a stop string
        self._tokens: deque[tuple[int, int, Token]] = deque()  # not emitted yet; where their text begins and ends
        self._given = 0  # characters emitted
        self.stopped = False

    def push(self, token: Token) -> tuple[str, tuple[Token, ...]]:
        """The text that can be emitted after this token, and the tokens it completes."""
        text = self._decoder.push(token.id)
        start = self._given + len(self._held)
        end = start + (len(text) or 1)  # an incomplete character counts as part of the next one
        self._held += text
        self._tokens.append((start, end, token))
        return self._give(self._clear())

    def flush(self) -> tuple[str, tuple[Token, ...]]:
        """The rest at the end of the answer."""
        if self.stopped:
            return "", ()
        self._held += self._decoder.flush()
        length = self._clear()
        if self.stopped:
            return self._give(length)
        text, tokens = self._give(len(self._held))
        return text, (*tokens, *(token for _, _, token in self._tokens))

    def _clear(self) -> int:
        """How many of the held characters are safe to emit."""
        found = [place for stop in self._stop if (place := self._held.find(stop)) >= 0]
        if found:
            self.stopped = True
            return min(found)
        begun = range(max(0, len(self._held) - max(map(len, self._stop), default=1) + 1), len(self._held))
        return next((i for i in begun if any(s.startswith(self._held[i:]) for s in self._stop)), len(self._held))

    def _give(self, length: int) -> tuple[str, tuple[Token, ...]]:
        text, self._held = self._held[:length], self._held[length:]
        self._given += length
        tokens = []
        while self._tokens:
            start, end, token = self._tokens[0]
            if end > self._given and not (self.stopped and start < self._given):  # a token that is cut still counts
                break
            tokens.append(token)
            self._tokens.popleft()
        return text, tuple(tokens)
