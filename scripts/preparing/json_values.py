"""The values in a JSON text of any size, cut out one by one: an array's elements, or consecutive objects."""

import re
from collections.abc import Iterable, Iterator

# A whole string, a bracket, or a string that has no end yet.
TOKEN = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*"|[\[\]{}]|"', re.DOTALL)
LONGEST = 64 << 20  # bytes of one value, and of one line: longer ones are not training data


class BrokenValues(ValueError):
    """The text is not JSON from here on; the message says why."""


def cut_values(blocks: Iterable[bytes]) -> Iterator[bytes]:
    """The values of a JSON text, as bytes: the elements if it is an array, else all consecutive values.

    For speed only brackets and strings are examined; parsing a value reveals errors inside it.

    Args:
        blocks: the text in pieces of any size.

    Raises:
        BrokenValues: the text ends within a value, closes what was never opened, or one value is longer than `LONGEST`.
    """
    buffer, scanned, start = b"", 0, None
    array = None  # whether the text is an array; not known before its first bracket
    depth = 0
    for block in blocks:
        buffer += block
        while found := TOKEN.search(buffer, scanned):
            token = found[0]
            if token == b'"':  # its end comes with the next block
                scanned = found.start()
                break
            scanned = found.end()
            if token in (b"{", b"["):
                if array is None:
                    array = token == b"["
                    if array:
                        continue
                if depth == 0:
                    start = found.start()
                depth += 1
            elif token in (b"}", b"]"):
                if depth == 0:
                    if array and token == b"]":
                        array = None  # another array may follow
                        continue
                    raise BrokenValues("a bracket is closed that was never opened")
                depth -= 1
                if depth == 0:
                    yield buffer[start:scanned]
                    start = None
        else:
            scanned = len(buffer)
        keep = scanned if start is None else start
        buffer, scanned = buffer[keep:], scanned - keep
        start = None if start is None else 0
        if len(buffer) > LONGEST:
            raise BrokenValues(f"a value is longer than {LONGEST >> 20} MB")
    if depth or array:
        raise BrokenValues("the text ends within a value" if depth else "the array has no end")
