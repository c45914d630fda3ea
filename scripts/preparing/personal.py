"""Finding and masking personal data: addresses and numbers."""

import re
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial

NUMBER = re.compile(r"\d[\d ()-]{7,}\d", re.ASCII)  # as long as the shortest of those below
URL = re.compile(r"(?:(?:https?|ftp)://|www\.)[^\s<>\"'`，。；：、！？（）()《》【】「」]{3,}", re.IGNORECASE)
EMAIL = re.compile(r"(?<![\w.+-])[\w.+-]{1,64}@(?:[A-Za-z0-9-]{1,63}\.){1,6}[A-Za-z]{2,24}(?![\w-])", re.ASCII)
PHONE = re.compile(
    r"(?<![\w.,/=+*-])(?:"
    r"(?:\+?86[ -]?)?1[3-9]\d[ -]?\d{4}[ -]?\d{4}"  # a Chinese mobile
    r"|0\d{2,3}-\d{7,8}(?:-\d{1,5})?"  # a Chinese landline
    r"|400-?\d{3}-?\d{4}|\+\d{1,3}[ -]?(?:\(\d{1,4}\)[ -]?)?\d{2,4}(?:[ -]?\d{2,4}){2,3}"
    r"|\(\d{3}\) ?\d{3}-\d{4}|\d{3}-\d{3}-\d{4}"  # North America
    r")(?![\w*/=+-]|[.,]\d)",
    re.ASCII,
)
CHINESE_ID = re.compile(
    r"(?<!\w)[1-9]\d{5}(?:19|20)\d{2}(?:0[1-9]|1[0-2])(?:0[1-9]|[12]\d|3[01])\d{3}[\dXx](?!\w)", re.ASCII
)
SOCIAL_SECURITY = re.compile(r"(?<![\w-])(?!000|666|9)\d{3}-(?!00)\d{2}-(?!0000)\d{4}(?![\w-])", re.ASCII)
CARD = re.compile(r"(?<![\w.-])(?:\d{4}[ -]){3}\d{1,7}(?![\w-])|(?<![\w.-])\d{13,19}(?![\w.-])", re.ASCII)
WEIGHTS = (7, 9, 10, 5, 8, 4, 2, 1, 6, 3, 7, 9, 10, 5, 8, 4, 2)  # of a Chinese ID's digits (GB 11643-1999)


def is_chinese_id(number: str) -> bool:
    """Whether the last character is the check digit of the others (ISO 7064, MOD 11-2)."""
    total = sum(weight * int(digit) for weight, digit in zip(WEIGHTS, number[:17], strict=True))
    return "10X98765432"[total % 11] == number[17].upper()


def is_card(number: str) -> bool:
    """Whether the digits have the check sum of bank cards (Luhn, ISO 7812)."""
    digits = [int(digit) for digit in reversed(number) if digit.isdigit()]
    doubled = (2 * digit - 9 * (digit > 4) for digit in digits[1::2])
    return 13 <= len(digits) <= 19 and len(set(digits)) > 2 and (sum(digits[::2]) + sum(doubled)) % 10 == 0


Pattern = tuple[re.Pattern, Callable[[str], bool]]
ALWAYS: Callable[[str], bool] = bool
PATTERNS: dict[str, tuple[str, tuple[Pattern, ...]]] = {  # of each kind, what takes its place
    "urls": ("[URL]", ((URL, ALWAYS),)),
    "emails": ("[EMAIL]", ((EMAIL, ALWAYS),)),
    "ids": ("[ID]", ((CHINESE_ID, is_chinese_id), (CARD, is_card), (SOCIAL_SECURITY, ALWAYS))),
    "phones": ("[PHONE]", ((PHONE, ALWAYS),)),
}


def may_hold(text: str, digits: int) -> Iterator[str]:
    """The kinds that a text with this many digits may contain, by a quick check."""
    if "://" in text or "www." in text or "WWW." in text:
        yield "urls"
    if "@" in text:
        yield "emails"
    if digits >= 9 and NUMBER.search(text):
        yield "ids"
        yield "phones"


def find(text: str, kind: str) -> bool:
    """Whether the text contains personal data of a kind."""
    return any(check(found[0]) for pattern, check in PATTERNS[kind][1] for found in pattern.finditer(text))


def mask(text: str, kind: str, counts: Counter) -> str:
    """The text with personal data of a kind masked, and counted by kind."""
    placeholder, patterns = PATTERNS[kind]

    def replace(check: Callable[[str], bool], found: re.Match) -> str:
        if not check(found[0]):
            return found[0]
        counts[kind] += 1
        return placeholder

    for pattern, check in patterns:
        text = pattern.sub(partial(replace, check), text)
    return text
