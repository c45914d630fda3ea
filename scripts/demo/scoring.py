"""The one scorer of every stage: normalise, then compare for equality.

Normalisation, in this order:

1. Unicode NFKC (full-width forms and ligatures become plain ones), and no upper case;
2. a dash before a digit and not after a letter or digit is a minus sign, "-5"; a point between digits stays, "3.5"; a
   comma that groups thousands goes, "1,000" is "1000"; all other punctuation and symbols become spaces;
3. white space at the ends and beside a Chinese character goes, all other becomes one space;
4. a leading "the", "a" or "an" goes.

Nothing else: an answer with one word too many is wrong.
"""

import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable

DASHES = str.maketrans(dict.fromkeys("\u2010\u2011\u2012\u2013\u2014\u2212", "-"))  # from the hyphen to the minus sign
THOUSANDS = re.compile(r"(?<=\d),(?=\d{3}(?!\d))")
PUNCTUATION = re.compile(r"(?<=\w)-|-(?!\d)|(?<!\d)\.|\.(?!\d)|[^\w\s.-]|_")
CHINESE = "[\u3400-\u9fff\U00020000-\U0003ffff]"
BESIDE_CHINESE = re.compile(rf"(?<={CHINESE}) | (?={CHINESE})")


def normalise(text: str) -> str:
    """The form in which answers are compared; see the module's docstring."""
    text = unicodedata.normalize("NFKC", text).casefold().translate(DASHES)
    text = PUNCTUATION.sub(" ", THOUSANDS.sub("", text))
    text = BESIDE_CHINESE.sub("", " ".join(text.split()))
    return re.sub(r"^(the|an?) ", "", text)


def is_right(answer: str, accepted: Iterable[str]) -> bool:
    """Whether the answer equals one of those accepted, both normalised."""
    return normalise(answer) in {normalise(text) for text in accepted}


def tally(questions: Iterable[dict], replies: Iterable[str]) -> dict[tuple[str, str], tuple[int, int]]:
    """Right and asked, for each (lang, kind), and for each language's (lang, "all").

    Args:
        questions: `{"question", "answers", "kind", "lang"}`; replies: what the model said to each, in order.
    """
    counts: dict[tuple[str, str], list[int]] = defaultdict(lambda: [0, 0])
    for question, reply in zip(questions, replies, strict=True):
        right = is_right(reply, question["answers"])
        for kind in (question["kind"], "all"):
            counts[question["lang"], kind][0] += right
            counts[question["lang"], kind][1] += 1
    return {key: (right, asked) for key, (right, asked) in counts.items()}


def format_table(counts: dict[tuple[str, str], tuple[int, int]]) -> str:
    """The tally as aligned text, a line per language and kind, "all" last where a language has several kinds."""
    kinds = Counter(lang for lang, _ in counts)
    lines = [f"{'lang':<6}{'kind':<14}{'right':>8}{'asked':>8}{'share':>9}"]
    for lang, kind in sorted(counts, key=lambda key: (key[0], key[1] == "all", key[1])):
        if kind == "all" and kinds[lang] == 2:
            continue
        right, asked = counts[lang, kind]
        lines.append(f"{lang:<6}{kind:<14}{right:>8}{asked:>8}{right / asked:>9.1%}")
    return "\n".join(lines)


def nearest_line(question: str, training: Iterable[str]) -> str:
    """The training question that shares most with this one: Jaccard overlap of character trigrams."""
    grams = _trigrams(question)
    return max(training, key=lambda line: len(grams & (other := _trigrams(line))) / len(grams | other))


def _trigrams(text: str) -> set[str]:
    text = f"  {normalise(text)} "
    return {text[i : i + 3] for i in range(len(text) - 2)}
