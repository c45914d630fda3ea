"""The language of a text, as far as it matters here: Chinese, English or another."""

import numpy as np

from scripts.preparing.characters import Counts

NAMES = ("zh", "en", "other")
HAN_LETTERS = 2.5  # Latin letters that say about as much as a Chinese character
ENGLISH = frozenset(
    "the of and to in is that for it with as was on be are this by you have from or an not what how i we he she".split()
)
FOREIGN = frozenset(
    (
        "de la el que en los las un una le les des et est du der die das und ist nicht ein eine mit von il di che per "
        "non um uma não para het een van och att det som yang dan và của nie jest się ve bir"
    ).split()
)
LOOKED_AT = 400  # characters of a text


def weights(texts: list[str], counts: Counts) -> np.ndarray:
    """The amount of each text in each language of `NAMES`, in Latin letters, float (n, 3).

    Han characters indicate Chinese, or with kana among them Japanese, which counts as another language. For text in
    Latin letters, accents and frequent short words decide whether it is English.
    """
    han, kana = counts.of("han") * HAN_LETTERS, counts.of("kana") * HAN_LETTERS
    latin, accented, others = counts.of("latin"), counts.of("accented"), counts.of("other_letter")
    japanese = kana * 8 > han
    zh = np.where(japanese, 0, han)
    en = np.where(accented * 20 > latin, 0, latin).astype(float)
    for number in np.flatnonzero((en > 30) & (en > zh)):
        words = texts[number][:LOOKED_AT].lower().split()
        foreign = sum(map(FOREIGN.__contains__, words))
        if foreign > 2 and foreign > sum(map(ENGLISH.__contains__, words)):
            en[number] = 0
    return np.stack([zh, en, han + kana + latin + accented + others - zh - en], axis=1)
