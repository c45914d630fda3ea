"""Detects wrongly decoded text by the characters that it leaves behind."""

import re

# What the bytes 0x80 to 0xBF become where UTF-8 is read as Windows-1252 or Latin-1
CONTINUED = "\u0080-\u00bf€‚ƒ„…†‡ˆ‰Š‹ŒŽ‘’“”•–—˜™š›œžŸ"
LATIN = re.compile(rf"[\u00c2-\u00df][{CONTINUED}]|[\u00e0-\u00ef][{CONTINUED}]{{2}}|[\u00f0-\u00f4][{CONTINUED}]{{3}}")
# UTF-8 read as GBK: marks and frequent words become such pairs (，。、“的是一了在), which Chinese does not have.
GBK = re.compile(r"[锛銆鈥鐨].?|鍦ㄤ|鏄竴|涓€|浜嗭|鎴戜|浠ュ|杩欎")
# U+FFFD in UTF-8 read as GBK, and memory that Microsoft's debugger fills
FILLED = re.compile(r"锟斤拷|(?:烫烫){2,}|(?:屯屯){2,}|ï¿½")
SURE = 2  # pairs, below which a text may have them by chance


def wrongly_decoded(text: str) -> int:
    """The number of characters in such pairs; 0 if there are too few to be sure."""
    found = sum(map(len, FILLED.findall(text)))
    for pattern in (LATIN, GBK):
        hits = [len(hit) for hit in pattern.findall(text)]
        if len(hits) >= SURE and sum(hits) * 100 > len(text):
            found += sum(hits)
    return found
