"""A small world of images: coloured shapes on varied backgrounds, with captions and questions.

Nothing here reads or writes files; `make_demo_images.py` does. All lengths are shares of the image's side.
"""

import colorsys
import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

LANGUAGES = ("en", "zh")


COLOURS = {  # name: (RGB, English, Chinese)
    "red": ((214, 40, 40), "red", "红色"),
    "orange": ((245, 133, 24), "orange", "橙色"),
    "yellow": ((246, 218, 40), "yellow", "黄色"),
    "green": ((38, 150, 60), "green", "绿色"),
    "blue": ((40, 80, 214), "blue", "蓝色"),
    "purple": ((138, 50, 176), "purple", "紫色"),
    "white": ((248, 248, 248), "white", "白色"),
    "black": ((16, 16, 16), "black", "黑色"),
}


SHAPES = {  # name: (English, Chinese)
    "circle": ("circle", "圆形"),
    "square": ("square", "正方形"),
    "triangle": ("triangle", "三角形"),
    "star": ("star", "五角星"),
    "cross": ("cross", "十字"),
    "ring": ("ring", "圆环"),
}


SIZES = {"big": ("big", "大"), "small": ("small", "小")}


PLACES = {  # (column, row): (English, Chinese)
    (0, 0): ("top left", "左上角"),
    (1, 0): ("top", "上方"),
    (2, 0): ("top right", "右上角"),
    (0, 1): ("left", "左边"),
    (1, 1): ("centre", "中间"),
    (2, 1): ("right", "右边"),
    (0, 2): ("bottom left", "左下角"),
    (1, 2): ("bottom", "下方"),
    (2, 2): ("bottom right", "右下角"),
}


NUMBERS = {1: ("one", "一"), 2: ("two", "两"), 3: ("three", "三"), 4: ("four", "四"), 5: ("five", "五")}


RELATIONS = {  # direction: (English phrase, English answer, Chinese, the direction back)
    "left": ("to the left of", "left", "左边", "right"),
    "right": ("to the right of", "right", "右边", "left"),
    "above": ("above", "above", "上面", "below"),
    "below": ("below", "below", "下面", "above"),
}


BACKGROUNDS = ((176, 176, 172), (140, 146, 150), (184, 170, 150), (150, 164, 180), (160, 150, 164), (150, 166, 148))

TEXTURES = ("plain", "gradient", "stripes", "checks", "noise")

CELLS = (0.25, 0.5, 0.75)  # centres of the three columns and rows…

JITTER = 0.02  # …which the centre of a thing may miss by so much

RADII = {"big": (0.18, 0.21), "small": (0.1, 0.125), "many": (0.085, 0.1)}


def is_held_out(colour: str, shape: str) -> bool:
    """Whether this pair of colour and shape is held out: one shape of each colour is, and a second of every other
    colour, so that every colour and every shape appears in training, but these pairs never do, neither for the tower
    nor for the language model; some of them share a colour, and some a shape."""
    number = list(COLOURS).index(colour)
    apart = (list(SHAPES).index(shape) - number) % len(SHAPES)
    return apart == 0 or (apart == 3 and number % 2 == 0)


Pair = tuple[str | None, str]  # colour, None for one that has no name here, and shape

KINDS_SEEN = [(c, s) for c in COLOURS for s in SHAPES if not is_held_out(c, s)]

KINDS_HELD_OUT = [(c, s) for c in COLOURS for s in SHAPES if is_held_out(c, s)]


# Shapes in stripes of two colours, or in one for which captions have no word: they teach that a shape has nothing to do
# with its colour, of which no caption tells then, and none of them is of a colour that it is kept away from.
KINDS_NAMELESS = [(None, s) for s in SHAPES]


BETWEEN_NAMES = {"lime": (70, 82), "turquoise": (168, 188), "pink": (318, 338)}  # hues in degrees


@dataclass(frozen=True)
class Thing:
    """A shape in a colour, centred at (x, y) with y downwards, `radius` to its outermost point, turned by degrees."""

    colour: str | None
    shape: str
    x: float
    y: float
    radius: float
    turn: float

    @property
    def pair(self) -> Pair:
        return self.colour, self.shape

    @property
    def size(self) -> str:
        return "big" if self.radius > 0.15 else "small"

    @property
    def place(self) -> tuple[int, int]:
        return tuple(min(range(3), key=lambda cell: abs(CELLS[cell] - at)) for at in (self.x, self.y))


@dataclass(frozen=True)
class Scene:
    """Things on a background; `seed` determines what captions do not mention: texture, shade, noise.

    `kind` is "one" (a single thing), "many" (1 to 5 of the same kind) or "two" (the first is `relation` the second).
    """

    kind: str
    things: tuple[Thing, ...]
    seed: int
    relation: str | None = None


# -------------------------------------------------------------------------------------------------- inventing


def invent(kind: str, kinds: Sequence[Pair], rng: random.Random) -> Scene:
    """A random scene with things of the given (colour, shape) pairs."""
    return {"one": _one, "many": _many, "two": _two}[kind](kinds, rng)


def _thing(pair: Pair, x: float, y: float, size: str, rng: random.Random) -> Thing:
    def jittered(at: float) -> float:
        return at + rng.uniform(-JITTER, JITTER)

    return Thing(*pair, jittered(x), jittered(y), rng.uniform(*RADII[size]), rng.uniform(-12, 12))


def _one(kinds, rng: random.Random) -> Scene:
    x, y = rng.choice(CELLS), rng.choice(CELLS)
    thing = _thing(rng.choice(kinds), x, y, rng.choice(list(SIZES)), rng)
    return Scene("one", (thing,), rng.getrandbits(32))


def _many(kinds, rng: random.Random) -> Scene:
    pair, cells = rng.choice(kinds), rng.sample(list(PLACES), rng.choice(list(NUMBERS)))
    things = tuple(_thing(pair, CELLS[x], CELLS[y], "many", rng) for x, y in cells)
    return Scene("many", things, rng.getrandbits(32))


def _two(kinds, rng: random.Random) -> Scene:
    first, second = rng.choice(kinds), rng.choice(kinds)
    while second[1] == first[1] or second[0] == first[0] is not None:
        second = rng.choice(kinds)
    relation, across, size = rng.choice(list(RELATIONS)), rng.choice(CELLS), rng.choice(list(SIZES))
    near, far = (CELLS[0], CELLS[2]) if relation in ("left", "above") else (CELLS[2], CELLS[0])
    ends = [(near, across), (far, across)] if relation in ("left", "right") else [(across, near), (across, far)]
    things = tuple(_thing(pair, x, y, size, rng) for pair, (x, y) in zip((first, second), ends, strict=True))
    return Scene("two", things, rng.getrandbits(32), relation)


# ---------------------------------------------------------------------------------------------------- drawing


def draw(scene: Scene, side: int) -> Image.Image:
    """The scene as an RGB image of side x side pixels; the same scene always gives the same pixels."""
    rng = np.random.default_rng(scene.seed)
    fine = 4 * side  # drawn four times finer, then reduced: smooth edges
    canvas = Image.fromarray(_background(rng, side)).resize((fine, fine), Image.Resampling.NEAREST)
    untold = np.random.default_rng((scene.seed, 1))  # of its own: no other picture hangs on what captions do not tell
    striped, between = untold.random() < 0.5, _between_names(untold)
    for thing in scene.things:
        form = Image.new("L", canvas.size)
        for polygon, covers in _outlines(thing):
            ImageDraw.Draw(form).polygon([(x * fine, y * fine) for x, y in polygon], fill=255 * covers)
        if thing.colour:
            fill = tuple(np.clip(COLOURS[thing.colour][0] + rng.integers(-10, 11, 3), 0, 255).tolist())
        else:
            fill = Image.fromarray(_stripes(thing, untold, fine)) if striped else between
        canvas.paste(fill, mask=form)
    return canvas.resize((side, side), Image.Resampling.BOX)


def _between_names(rng: np.random.Generator) -> tuple[int, int, int]:
    """A colour without a name in the captions, mostly pale, because only pale colours border on white."""
    hue = rng.uniform(*BETWEEN_NAMES[rng.choice(list(BETWEEN_NAMES))])
    saturation, value = rng.triangular(0.25, 0.25, 1), rng.uniform(0.9, 1)
    return tuple(round(255 * channel) for channel in colorsys.hsv_to_rgb(hue / 360, saturation, value))


def _stripes(thing: Thing, rng: np.random.Generator, side: int) -> np.ndarray:
    """Several stripes of two named colours across the thing, at any angle, uint8 (side, side, 3)."""
    one, other = (COLOURS[name][0] for name in rng.choice(list(COLOURS), 2, replace=False))
    angle, phase, period = rng.uniform(0, np.pi), rng.uniform(), rng.uniform(0.6, 1.2) * thing.radius
    y, x = np.mgrid[:side, :side] / side
    along = (x - thing.x) * np.cos(angle) + (y - thing.y) * np.sin(angle)
    return np.where((along / period + phase)[..., None] % 1 < 0.5, one, other).astype(np.uint8)


def _background(rng: np.random.Generator, side: int) -> np.ndarray:
    """A muted, textured background, uint8 (side, side, 3)."""
    shade = np.array(BACKGROUNDS[rng.integers(len(BACKGROUNDS))], float) + rng.uniform(-14, 14)
    y, x = np.mgrid[:side, :side] / side
    texture = TEXTURES[rng.integers(len(TEXTURES))]
    angle, period = rng.uniform(0, np.pi), rng.uniform(0.1, 0.25)
    along = x * np.cos(angle) + y * np.sin(angle)
    light = {
        "plain": np.zeros((side, side)),
        "gradient": 24 * (along - 0.5),
        "stripes": 9 * np.sign(np.sin(2 * np.pi * along / period)),
        "checks": 9 * np.sign(np.sin(np.pi * x / period) * np.sin(np.pi * y / period)),
        "noise": rng.normal(0, 8, (side, side)),
    }[texture]
    return np.clip(shade + light[..., None], 0, 255).astype(np.uint8)


def _outlines(thing: Thing) -> Iterator[tuple[list[tuple[float, float]], bool]]:
    """The polygons of a thing, and whether each covers the background or, like a ring's hole, shows it."""
    for shape, scale, covers in ((thing.shape, 1.0, True), ("hole", 0.55, False))[: 1 + (thing.shape == "ring")]:
        turn, radius = math.radians(thing.turn), thing.radius * scale
        cos, sin = radius * math.cos(turn), radius * math.sin(turn)
        yield [(thing.x + x * cos - y * sin, thing.y + x * sin + y * cos) for x, y in _unit_outline(shape)], covers


def _unit_outline(shape: str) -> list[tuple[float, float]]:
    """The corners of a shape of radius 1 around (0, 0), y pointing down."""

    def spoke(degrees: float, length: float = 1.0) -> tuple[float, float]:
        return length * math.sin(math.radians(degrees)), -length * math.cos(math.radians(degrees))

    if shape in ("circle", "ring", "hole"):
        return [spoke(angle) for angle in range(0, 360, 6)]
    if shape == "square":
        return [spoke(45 + 90 * k) for k in range(4)]
    if shape == "triangle":
        return [spoke(120 * k) for k in range(3)]
    if shape == "star":
        return [spoke(36 * k, 1.0 if k % 2 == 0 else 0.42) for k in range(10)]
    arm = 0.3  # a cross: twelve corners
    quarter = [(arm, -0.95), (arm, -arm), (0.95, -arm)]
    corners = []
    for _ in range(4):
        corners += quarter
        quarter = [(-y, x) for x, y in quarter]
    return corners
