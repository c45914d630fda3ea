"""trainer/answer_check.py: the right number is accepted in every usual spelling, and nothing that only resembles it."""

import pytest

from trainer.answer_check import is_right_answer

RIGHT = [
    *[("42", text) for text in ("42", " 42 ", "\n42\n", "42.", "42。", "= 42.", "=42", "42.0", "+42", "84/2", "042")],
    *[("42", text) for text in ("\uff14\uff12", "四十二", "四十二个。", "42 apples", "42个", "$42", "42元", "42!")],
    *[("1234", text) for text in ("1,234", "1\uff0c234", "1\u00a0234", "1\u202f234", "一千二百三十四", "1234 cm")],
    *[("1/2", text) for text in ("0.5", "0.50", "1 / 2", "2/4", "½", "二分之一", "零点五", "1\u20442")],
    *[("-5", text) for text in ("-5", "\u22125", "负五", "负5", "-5.0")],
    *[("10500", text) for text in ("一万零五百", "10,500", "1.05万")],
    *[("250", text) for text in ("二百五十", "两百五", "两百五十")],
    *[("205", text) for text in ("二百零五", "两百〇五")],
    *[("15000", "一万五"), ("15000", "1.5万"), ("12", "十二"), ("10", "十"), ("2025", "二零二五")],
    *[("300050000", "三亿零五万"), ("20300", "两万零三百"), ("3.25", "三点二五")],
    *[("5 cm", text) for text in ("5 cm", "5cm", "\uff15 CM", "5 cm.")],
    *[
        ("0.1", "0.10"),
        ("1e2", "1e2"),
        ("Paris", "paris."),
        ("New  York", "new york"),
        ("yes", "YES!"),
        ("巴黎", "巴黎。"),
    ],
]
WRONG = [
    *[("42", text) for text in ("", "43", "4 2", "41 or 42", "42 43", "42, 43", "42/43", "not 42", "42 41", "42!43")],
    *[
        ("42", text)
        for text in ("41 = 42", "12 + 30", "12 + 30 = 42", "about 42", "42\n42", "4二", "-42", "--42", "42-")
    ],
    *[("1234", text) for text in ("1 234", "1,23,4", "12,34", "1.234")],
    *[("1234567", "1234,567"), ("0.42", "42%"), ("20", "十十"), ("12", "一二十"), ("11/2", "1½"), ("1", "1/0")],
    *[("5 cm", text) for text in ("5", "5 m", "50 mm", "cm")],
    *[("Paris", text) for text in ("Paris London", "Paris or London", "", "Par is")],
]


@pytest.mark.parametrize(("expected", "text"), RIGHT)
def test_the_right_answer_in_any_spelling(expected, text):
    assert is_right_answer(text, expected)


@pytest.mark.parametrize(("expected", "text"), WRONG)
def test_what_only_looks_like_the_right_answer(expected, text):
    assert not is_right_answer(text, expected)


@pytest.mark.parametrize("number", [*range(0, 120), 200, 205, 250, 1000, 1001, 1010, 1100, 9999, 10000, 10500, 120304])
def test_chinese_numbers_are_read_as_they_are_written(number):
    """The oracle writes out a number digit by digit, each with its place value."""

    def below_10000(n: int) -> str:
        text, zero = "", False
        for place, name in ((1000, "千"), (100, "百"), (10, "十"), (1, "")):
            digit = n // place % 10
            if digit:
                text += ("零" if zero and text else "") + "零一二三四五六七八九"[digit] + name
            zero = not digit
        return text

    high, low = divmod(number, 10000)
    gap = "零" if high and 0 < low < 1000 else ""
    spelled = (below_10000(high) + "万" if high else "") + gap + below_10000(low) or "零"
    assert is_right_answer(spelled, str(number)), spelled
    assert not is_right_answer(spelled, str(number + 1))
