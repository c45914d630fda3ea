"""Texts on a drawn scene, in both languages: captions, questions, comparisons."""

import random
from collections.abc import Iterator
from dataclasses import dataclass

from scripts.demo.scenes import COLOURS, LANGUAGES, NUMBERS, PLACES, RELATIONS, SHAPES, SIZES, Pair, Scene

# -------------------------------------------------------------------------------------------------- captions


def captions(scene: Scene, lang: str) -> list[str]:
    """Captions that are true of a scene, in a language, the most complete first."""
    first = scene.things[0]
    parts = [say_shape(first.shape, lang)]
    if first.colour:
        parts.append(say_colour(first.colour, lang))
    if scene.kind == "one":
        whole = say_where(first.pair, first.size, first.place, lang)
        return [whole, say_where_first(first.pair, first.size, first.place, lang), say_what(first.pair, lang), *parts]
    if scene.kind == "many":
        number = len(scene.things)
        return [say_how_many(first.pair, number, lang), say_number(number, lang), *parts]
    relation, back = scene.relation, RELATIONS[scene.relation][3]
    names = [
        (
            say_what(thing.pair, lang),
            say_shape(thing.shape, lang),
            *([say_colour(thing.colour, lang)] if thing.colour else []),
        )
        for thing in scene.things
    ]
    return [
        said
        for one, other in zip(*names, strict=True)
        for said in (say_relation(one, relation, other, lang), say_relation(other, back, one, lang))
    ]


def alternatives(scene: Scene, lang: str) -> Iterator[tuple[str, list[str], int]]:
    """Alternative captions for zero-shot exams: (aspect, captions, index of the true one)."""
    first, second = scene.things[0], scene.things[-1]
    if scene.kind == "one":
        pairs, places = [(c, s) for c in COLOURS for s in SHAPES], list(PLACES)
        yield "colour and shape", [say_what(pair, lang) for pair in pairs], pairs.index(first.pair)
        described = [say_where(first.pair, first.size, place, lang) for place in places]
        yield "position", described, places.index(first.place)
    elif scene.kind == "many":
        numbers = list(NUMBERS)
        yield "count", [say_how_many(first.pair, n, lang) for n in numbers], numbers.index(len(scene.things))
    else:
        relations = list(RELATIONS)
        pairs = say_what(first.pair, lang), say_what(second.pair, lang)
        described = [say_relation(pairs[0], relation, pairs[1], lang) for relation in relations]
        yield "relation", described, relations.index(scene.relation)


def _name(pair: Pair, lang: str) -> str:
    """'red circle', '红色圆形'; only the shape if the colour has no name."""
    colour, shape = COLOURS[pair[0]][1:] if pair[0] else ("", ""), SHAPES[pair[1]]
    return f"{colour[0]} {shape[0]}".lstrip() if lang == "en" else f"{colour[1]}{shape[1]}"


def _article(noun: str) -> str:
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def say_what(pair: Pair, lang: str) -> str:
    return _article(_name(pair, "en")) if lang == "en" else f"一个{_name(pair, 'zh')}"


def say_where(pair: Pair, size: str, place: tuple[int, int], lang: str) -> str:
    if lang == "zh":
        return f"{PLACES[place][1]}有一个{SIZES[size][1]}的{_name(pair, lang)}"
    return f"a {SIZES[size][0]} {_name(pair, lang)} {'in' if place == (1, 1) else 'at'} the {PLACES[place][0]}"


def say_where_first(pair: Pair, size: str, place: tuple[int, int], lang: str) -> str:
    i = LANGUAGES.index(lang)
    said = [SHAPES[pair[1]][i], *([COLOURS[pair[0]][1 + i]] if pair[0] else []), SIZES[size][i]]
    return f"{PLACES[place][1]}：{'，'.join(said)}" if i else f"{PLACES[place][0]}: {_article(', '.join(said))}"


def say_colour(colour: str, lang: str) -> str:
    return f"something {COLOURS[colour][1]}" if lang == "en" else f"{COLOURS[colour][2]}的东西"


def say_shape(shape: str, lang: str) -> str:
    return _article(SHAPES[shape][0]) if lang == "en" else f"一个{SHAPES[shape][1]}"


def say_number(number: int, lang: str) -> str:
    things = "thing" if number == 1 else "things"
    return f"{NUMBERS[number][0]} {things}" if lang == "en" else f"{NUMBERS[number][1]}个东西"


def say_how_many(pair: Pair, number: int, lang: str) -> str:
    if lang == "zh":
        return f"{NUMBERS[number][1]}个{_name(pair, lang)}"
    ending = "" if number == 1 else "es" if pair[1] == "cross" else "s"
    return f"{NUMBERS[number][0]} {_name(pair, lang)}{ending}"


def say_relation(first: str, relation: str, second: str, lang: str) -> str:
    """The relation of two things as a phrase; `first` and `second` come from `say_what`, `say_colour`, `say_shape`."""
    en, _, zh, _ = RELATIONS[relation]
    return f"{first}在{second}的{zh}" if lang == "zh" else f"{first} {en} {second}"


# ------------------------------------------------------------------------------------------- questions, answers


@dataclass(frozen=True)
class Question:
    """A question about a scene, or about two, and its answer, both in `lang`."""

    kind: str
    lang: str
    text: str
    answer: str


ASKED = {  # kind: language: phrasings; {} is filled in by what the question is about
    "colour": {
        "en": ("What colour is the object?", "Tell me the colour of the object."),
        "zh": ("物体是什么颜色的？", "请说出物体的颜色。"),
    },
    "shape": {
        "en": ("What shape is the object?", "Tell me the shape of the object."),
        "zh": ("物体是什么形状的？", "请说出物体的形状。"),
    },
    "position": {
        "en": ("Where is the object?", "In which part of the picture is the object?"),
        "zh": ("物体在哪里？", "物体在图中的哪个位置？"),
    },
    "size": {
        "en": ("Is the object big or small?", "Tell me the size of the object."),
        "zh": ("物体是大还是小？", "请说出物体的大小。"),
    },
    "count": {
        "en": ("How many objects are there?", "Count the objects."),
        "zh": ("图中有几个物体？", "数一数物体有几个。"),
    },
    "relation": {
        "en": ("Where is the {0}, seen from the {1}?", "On which side of the {1} is the {0}?"),
        "zh": ("{0}在{1}的哪一边？", "从{1}看，{0}在哪一边？"),
    },
    "colour of one": {
        "en": ("What colour is the object {}?", "Tell me the colour of the object {}."),
        "zh": ("{}的物体是什么颜色的？", "请说出{}的物体的颜色。"),
    },
    "shape of one": {
        "en": ("What shape is the object {}?", "Tell me the shape of the object {}."),
        "zh": ("{}的物体是什么形状的？", "请说出{}的物体的形状。"),
    },
    "same colour": {
        "en": ("Do the two objects have the same colour?", "Are both objects of one colour?"),
        "zh": ("两个物体的颜色相同吗？", "两张图里物体的颜色一样吗？"),
    },
    "same shape": {
        "en": ("Do the two objects have the same shape?", "Are both objects of one shape?"),
        "zh": ("两个物体的形状相同吗？", "两张图里物体的形状一样吗？"),
    },
    "bigger": {
        "en": ("Which picture shows the bigger object?", "In which picture is the object bigger?"),
        "zh": ("哪张图里的物体更大？", "更大的物体在哪张图里？"),
    },
}


ONE_OF_TWO = {  # direction: how that one of two objects is called
    "left": ("on the left", "左边"),
    "right": ("on the right", "右边"),
    "above": ("at the top", "上面"),
    "below": ("at the bottom", "下面"),
}


SAME = {True: ("Yes, the same.", "相同。"), False: ("No, different.", "不同。")}

ORDINALS = (("The first.", "第一张。"), ("The second.", "第二张。"))


DESCRIBE = {
    "en": ("Describe the picture.", "What do you see?", "What is in the picture?"),
    "zh": ("请描述这张图片。", "图里有什么？", "你看到了什么？"),
}


def _ask(kind: str, lang: str, rng: random.Random, *about: str) -> str:
    return rng.choice(ASKED[kind][lang]).format(*about)


def _sentence(answer: str, lang: str) -> str:
    """'top left' -> 'Top left.', '左上角' -> '左上角。'"""
    return f"{answer[0].upper()}{answer[1:]}." if lang == "en" else f"{answer}。"


def questions(scene: Scene, lang: str, rng: random.Random) -> list[Question]:
    """All questions about a scene, each once, in a random phrasing."""
    i = LANGUAGES.index(lang)
    first = scene.things[0]

    def made(kind: str, answer: str, *about: str) -> Question:
        return Question(kind, lang, _ask(kind, lang, rng, *about), _sentence(answer, lang))

    if scene.kind == "one":
        return [
            *([made("colour", COLOURS[first.colour][1 + i])] if first.colour else []),
            made("shape", SHAPES[first.shape][i]),
            made("position", PLACES[first.place][i]),
            made("size", SIZES[first.size][i]),
        ]
    if scene.kind == "many":
        number = NUMBERS[len(scene.things)][i]
        return [made("count", number if lang == "en" else f"{number}个")]
    second = scene.things[1]
    _, en, zh, back = RELATIONS[scene.relation]
    one, direction = rng.choice([(first, scene.relation), (second, back)])
    called = ONE_OF_TWO[direction][i]
    return [
        made("relation", (en, zh)[i], SHAPES[first.shape][i], SHAPES[second.shape][i]),
        *([made("colour of one", COLOURS[one.colour][1 + i], called)] if one.colour else []),
        made("shape of one", SHAPES[one.shape][i], called),
    ]


def comparisons(first: Scene, second: Scene, lang: str, rng: random.Random) -> list[Question]:
    """All questions about two scenes with one thing each."""
    i = LANGUAGES.index(lang)
    a, b = first.things[0], second.things[0]
    asked = [("same shape", SAME[a.shape == b.shape][i])]
    if a.colour and b.colour:
        asked.append(("same colour", SAME[a.colour == b.colour][i]))
    if a.size != b.size:
        asked.append(("bigger", ORDINALS[b.size == "big"][i]))
    return [Question(kind, lang, _ask(kind, lang, rng), answer) for kind, answer in asked]
