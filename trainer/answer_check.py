"""Whether an answer is the right one: numbers in any usual spelling, words by equality; one answer, not several."""

import re
import unicodedata
from fractions import Fraction
from typing import NamedTuple

DIGITS = {char: value for value, char in enumerate("零一二三四五六七八九")} | {"〇": 0, "两": 2, "俩": 2}
PLACES = {"十": 10, "百": 100, "千": 1000}
GROUPS = {"万": 10**4, "亿": 10**8}
_CHINESE = rf"[{''.join(DIGITS | PLACES | GROUPS)}]+(?:点[{''.join(DIGITS)}]+)?"
CHINESE_NUMBER = re.compile(rf"(?<!\d)负?{_CHINESE}(?!\d)")
CHINESE_FRACTION = re.compile(rf"(负?)({_CHINESE})分之({_CHINESE})")
MIXED = re.compile(r"(\d+(?:\.\d+)?)([万亿])")  # 3.5万
DASHES = str.maketrans(dict.fromkeys("\u2010\u2011\u2012\u2013\u2014\u2212", "-") | {"\u2044": "/", "\u2215": "/"})
NARROW_FRACTION = re.compile(r"(?<=\d)(?=[\u00bc-\u00be\u2150-\u215e])")  # 1½, which NFKC would turn into 11/2
GROUPING_SPACES = re.compile(r"(?<=\d)[\u00a0\u2009\u202f](?=\d{3}(?!\d))")  # "1 234" with a space that does not break
NUMBER = re.compile(r"[-+]?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?(?:\s*/\s*\d+)?")
CURRENCY = "$€£¥"
UNIT = r"[^\W\d_]{1,12}[23]?|%|°[CF]?"  # "cm", "m2", "个", "apples"
FORM = re.compile(
    r"\s*(?:=\s*)?(?P<currency>[$€£¥]?)\s*(?P<number>" + NUMBER.pattern + rf")\s*(?P<unit>{UNIT})?\s*[.。!]?\s*"
)


class Quantity(NamedTuple):
    """An exact number and the unit after it (or the currency before it); "" if there is none."""

    value: Fraction
    unit: str


def is_right_answer(answer: str, expected: str) -> bool:
    """Whether `answer` is the expected answer, and nothing else.

    Numbers are compared by value, so that "= 42.", full-width digits, "四十二", "42.0" and "84/2" are all 42, and
    "1,234" is 1234. A unit after the number is ignored if none is expected ("42 apples" for 42); if one is expected, it
    must be there. Two numbers are two answers, and never right. Anything else is compared as text; letter case,
    spacing and the punctuation around it do not count.
    """
    right, given = read_quantity(expected), read_quantity(answer)
    if right is None:
        return _plain(answer) == _plain(expected)
    return given is not None and given.value == right.value and right.unit in ("", given.unit)


def read_quantity(text: str) -> Quantity | None:
    """The only number in a text, with its unit; None if there is none or more than one."""
    text = NARROW_FRACTION.sub(" ", GROUPING_SPACES.sub("", text))
    text = unicodedata.normalize("NFKC", text).translate(DASHES)
    found = FORM.fullmatch(_with_digits(text))
    if found is None:
        return None
    try:
        value = Fraction(re.sub(r"[\s,]", "", found["number"]))
    except (ValueError, ZeroDivisionError):  # "1.5/2", "1/0"
        return None
    return Quantity(value, (found["currency"] or found["unit"] or "").casefold())


def _plain(text: str) -> str:
    text = unicodedata.normalize("NFKC", text).casefold()
    return " ".join(text.split()).strip(" .。!！,，;；:：\"'“”‘’")


def _with_digits(text: str) -> str:
    """Chinese numbers as digits: 四十二 -> 42, 三分之二 -> 2/3, 负三点五 -> -3.5, 1.5万 -> 15000."""
    text = re.sub(r"负(?=\d)", "-", text)
    text = MIXED.sub(lambda m: str(Fraction(m[1]) * GROUPS[m[2]]), text)
    text = CHINESE_FRACTION.sub(lambda m: _fraction(*m.groups()), text)
    return CHINESE_NUMBER.sub(lambda m: _number(m[0]), text)


def _fraction(sign: str, below: str, above: str) -> str:
    return f"{'-' if sign else ''}{_number(above)}/{_number(below)}"


def _number(text: str) -> str:
    """The digits of a Chinese number; the text itself if it is not a number (十十)."""
    sign = "-" if text.startswith("负") else ""
    whole, _, decimals = text.removeprefix("负").partition("点")
    value = _whole_number(whole)
    if value is None:
        return text
    return f"{sign}{value}" + (f".{''.join(str(DIGITS[char]) for char in decimals)}" if decimals else "")


def _whole_number(text: str) -> int | None:
    """四十二 -> 42, 十二 -> 12, 一万零五百 -> 10500, 两百五 -> 250, 二零二五 -> 2025; None if it is not a number."""
    if all(char in DIGITS for char in text):  # digit by digit, as years are read
        return int("".join(str(DIGITS[char]) for char in text))
    total = group = 0  # before the last 万 or 亿, and since
    digit: int | None = None
    least, last_group, zero = 10**4, 10**12, False
    for char in text:
        if char in DIGITS:
            if digit is not None and digit != 0:
                return None
            digit, zero = DIGITS[char], zero or DIGITS[char] == 0
        elif char in PLACES:
            if PLACES[char] >= least:
                return None
            group += (1 if digit is None else digit) * PLACES[char]
            digit, least, zero = None, PLACES[char], False
        else:
            if GROUPS[char] >= last_group or (group == 0 and not digit):
                return None
            total += (group + (digit or 0)) * GROUPS[char]
            last_group = least_group = GROUPS[char]
            group, digit, least, zero = 0, None, 10**4, False
    if digit and not zero and least not in (10, 10**4):  # 两百五 is 250, 两百零五 is 205
        digit *= least // 10
    elif digit and not zero and least == 10**4 and total and group == 0:  # 一万五 is 15000
        digit *= least_group // 10
    return total + group + (digit or 0)
