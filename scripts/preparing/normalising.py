"""Normalising texts: NFC, plain letters and digits, plain spaces and line breaks.

Text between backquotes is unchanged, and so are all characters of lines that look like code. Chinese punctuation stays
full-width; indentation stays; nothing is joined or reflowed.
"""

import re
import unicodedata

FENCED = re.compile(r"(```.*?(?:```|\Z)|`[^`\n]+`)", re.DOTALL)
KEYWORDS = "|".join(
    "def class import from return if elif else for while print var let const public private #include function".split()
)
CODE_LINE = re.compile(
    rf"[;{{}}]\s*$|^\s*(?:{KEYWORDS})\b.*[:(){{}};=]"
    r"|[=!<>]=|[-=]>|\w\(.*\)\s*[:;]?\s*$|^\s*</?[A-Za-z][^>]*>|^ {4,}\S|^\t+\S"
)
TRAILING = re.compile(r"[ \t\u3000]+(?=\n)")
BLANK_LINES = re.compile(r"\n{4,}")
SPACES = "\xa0\u1680\u202f\u205f" + "".join(map(chr, range(0x2000, 0x200B)))
NOTHING = "\u200b\u2060\ufeff" + "".join(map(chr, (*range(9), *range(14, 32), *range(0x7F, 0xA0))))
CHARACTERS = {
    **dict.fromkeys(map(ord, SPACES), " "),
    **dict.fromkeys(map(ord, NOTHING), None),
    **dict.fromkeys(map(ord, "\u2028\u2029\x0b\x0c\x85"), "\n"),
    **{0xFF00 + number: chr(0x20 + number) for number in (*range(0x10, 0x1A), *range(0x21, 0x3B), *range(0x41, 0x5B))},
}


def looks_untidy(text: str) -> bool:
    """Whether white space of the text may change; for other characters see `characters.count`."""
    return bool(text) and (
        " \n" in text
        or "\n\n\n\n" in text
        or text[0].isspace()
        or text[-1].isspace()
        or "\t\n" in text
        or "\u3000\n" in text
        or "\r" in text
    )


def normalise(text: str) -> str:
    """The text in NFC, with plain letters, digits, spaces and line breaks, without control and invisible characters or
    white space at line ends, and with at most two blank lines in a row; code is unchanged."""
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    if "`" in text:
        parts = FENCED.split(text)
        parts[::2] = map(_plain, parts[::2])
        text = "".join(parts)
    else:
        text = _plain(text)
    begin = len(text) - len(text.lstrip())
    line = text.rfind("\n", 0, begin) + 1  # the first that is not blank
    if CODE_LINE.search(text[line:].partition("\n")[0]):  # code keeps its indentation
        begin = line
    return text[begin:].rstrip()


def _plain(text: str) -> str:
    plain = unicodedata.normalize("NFC", text.translate(CHARACTERS))
    if plain != text:
        lines = text.split("\n")
        if any(map(CODE_LINE.search, lines)):
            plain = "\n".join(_plain_line(line) for line in lines)
    return BLANK_LINES.sub("\n\n\n", TRAILING.sub("", plain))


def _plain_line(line: str) -> str:
    if CODE_LINE.search(line):
        return line
    return unicodedata.normalize("NFC", line.translate(CHARACTERS))
