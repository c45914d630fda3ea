"""The demo's images: they show what their captions say, and the exam contains nothing from training."""

import colorsys
import json
import random
import re
import shutil
from collections import Counter
from itertools import product
from pathlib import Path

import numpy as np
import pytest

from scripts.demo.scene_texts import alternatives, captions, comparisons, questions
from scripts.demo.scenes import (
    COLOURS,
    KINDS_HELD_OUT,
    KINDS_NAMELESS,
    KINDS_SEEN,
    LANGUAGES,
    SHAPES,
    Scene,
    Thing,
    draw,
    invent,
    is_held_out,
)
from scripts.make_demo_images import examination, main, pairs
from trainer.errors import UserError

COLUMNS, ROWS = ("left", "centre", "right"), ("top", "centre", "bottom")


def painted(picture: np.ndarray, colour: str) -> np.ndarray:
    """The pixels of this colour, bool (side, side)."""
    return np.abs(picture.astype(int) - COLOURS[colour][0]).max(-1) < 28


HUES = {  # hues in degrees that have a name in COLOURS; between them lie lime, turquoise and pink
    "red": (345, 375),
    "orange": (15, 42),
    "yellow": (42, 66),
    "green": (86, 164),
    "blue": (192, 256),
    "purple": (256, 314),
}


def name_of(colour: np.ndarray) -> str | None:
    """The name in COLOURS of an RGB colour; None for a colour between the named ones."""
    hue, saturation, value = colorsys.rgb_to_hsv(*(colour / 255))
    if value < 0.25:
        return "black"
    if saturation < 0.2:
        return "white" if value > 0.8 else None
    return next((name for name, (low, high) in HUES.items() if (360 * hue - low) % 360 < high - low), None)


def parts(where: np.ndarray) -> list[np.ndarray]:
    """The connected parts of more than a few pixels, each as coordinates (y, x), (pixels, 2)."""
    left, found = {(int(y), int(x)) for y, x in zip(*where.nonzero(), strict=True)}, []
    while left:
        part, edge = [], [left.pop()]
        while edge:
            y, x = edge.pop()
            part.append((y, x))
            near = {(y + i, x + j) for i in (-1, 0, 1) for j in (-1, 0, 1)} & left
            left -= near
            edge += near
        if len(part) > 12:
            found.append(np.array(part))
    return found


class TestPictures:
    """The pixels, compared with the English caption."""

    @pytest.mark.parametrize("seed", range(6))
    def test_one_thing(self, seed):
        scene = invent("one", KINDS_SEEN + KINDS_HELD_OUT, random.Random(seed))
        _, size, colour, shape, _, _, *place = captions(scene, "en")[0].split()
        picture = np.asarray(draw(scene, 96))
        (part,) = parts(painted(picture, colour))
        y, x = (part.min(0) + part.max(0)) / 2 / 96
        named = [ROWS[int(y * 3 - 0.001)], COLUMNS[int(x * 3 - 0.001)]]
        assert [word for word in named if word != "centre"] == [word for word in place if word != "centre"]
        assert size == ("big" if np.ptp(part, axis=0).max() > 0.27 * 96 else "small")
        assert SHAPES[shape]
        middle = picture[int(y * 96), int(x * 96)]
        assert painted(middle[None, None], colour)[0, 0] == (shape != "ring")

    @pytest.mark.parametrize("seed", range(6))
    def test_many_things(self, seed):
        scene = invent("many", KINDS_SEEN, random.Random(seed))
        number, colour, _ = captions(scene, "en")[0].split()
        count = len(parts(painted(np.asarray(draw(scene, 192)), colour)))
        assert number == ("one", "two", "three", "four", "five")[count - 1]

    @pytest.mark.parametrize("seed", range(6))
    def test_two_things(self, seed):
        scene = invent("two", KINDS_SEEN, random.Random(seed))
        words = captions(scene, "en")[0].split()
        relation = next(word for word in words if word in ("left", "right", "above", "below"))
        first, second = (word for word in words if word in COLOURS)
        picture = np.asarray(draw(scene, 96))
        (y1, x1), (y2, x2) = (max(parts(painted(picture, c)), key=len).mean(0) for c in (first, second))
        assert {"left": x1 < x2 - 20, "right": x1 > x2 + 20, "above": y1 < y2 - 20, "below": y1 > y2 + 20}[relation]

    def test_the_names_are_those_that_people_give(self):
        for name, (rgb, *_) in COLOURS.items():
            assert name_of(np.array(rgb)) == name

    @pytest.mark.parametrize("kind", ["one", "many", "two"])
    def test_no_shape_is_seen_in_a_colour_that_it_is_kept_away_from(self, kind):
        """Checked in the pixels of things whose colour is not named: it must not look like a withheld one."""
        most, striped = 0.0, 0
        for seed in range(40):
            scene = invent(kind, KINDS_NAMELESS, random.Random(seed))
            picture, ground = np.asarray(draw(scene, 96)), np.asarray(draw(Scene(kind, (), scene.seed), 96))
            shown = np.argwhere(np.abs(picture.astype(int) - ground).max(-1) > 40)
            apart = [np.hypot(shown[:, 1] - 96 * thing.x, shown[:, 0] - 96 * thing.y) for thing in scene.things]
            for number, thing in enumerate(scene.things):
                its = shown[np.argmin(apart, 0) == number]
                names = [name_of(picture[y, x]) for y, x in its]
                away = [colour for colour in COLOURS if is_held_out(colour, thing.shape)]
                most = max(most, *(names.count(colour) / len(names) for colour in away))
                striped += len(set(names) - {None}) > 1
        assert most < 0.75  # the wider of two stripes
        assert striped > 10

    @pytest.mark.parametrize("kind", ["one", "many", "two"])
    def test_nobody_speaks_of_a_colour_without_a_name(self, kind):
        words = {word for _, *names in COLOURS.values() for word in names}
        for seed in range(8):
            rng = random.Random(seed)
            scene = invent(kind, KINDS_NAMELESS, rng)
            for lang in LANGUAGES:
                said = [*captions(scene, lang), *(q.text + q.answer for q in questions(scene, lang, rng))]
                assert len(said) > 2
                assert not [text for text in said for word in words if word in text.lower()]
                assert not [question for question in questions(scene, lang, rng) if "colour" in question.kind]
            plain = Scene(kind, (), scene.seed)
            picture, ground = np.asarray(draw(scene, 96)), np.asarray(draw(plain, 96))
            shown = np.abs(picture.astype(int) - ground).max(-1) > 25
            assert len(parts(shown)) == len(scene.things)

    def test_the_shapes_are_different_ones(self):
        def outline(shape: str) -> np.ndarray:
            scene = Scene("one", (Thing("red", shape, 0.5, 0.5, 0.3, 0),), seed=0)
            return painted(np.asarray(draw(scene, 64)), "red")

        outlines = [outline(shape) for shape in SHAPES]
        for i, one in enumerate(outlines):
            for other in outlines[:i]:
                assert (one & other).sum() / (one | other).sum() < 0.85

    def test_the_same_scene_gives_the_same_pixels(self):
        scene = invent("two", KINDS_SEEN, random.Random(3))
        assert draw(scene, 48).tobytes() == draw(scene, 48).tobytes()
        assert draw(scene, 48).tobytes() != draw(invent("two", KINDS_SEEN, random.Random(4)), 48).tobytes()


class TestScenes:
    @pytest.mark.parametrize("kinds", [KINDS_SEEN, KINDS_NAMELESS], ids=["named", "nameless"])
    def test_two_things_differ_in_shape_and_in_what_their_colours_are_called(self, kinds):
        rng = random.Random(0)
        for _ in range(300):
            first, second = invent("two", kinds, rng).things
            assert first.shape != second.shape
            assert first.colour is None or first.colour != second.colour

    @pytest.mark.parametrize("lang", LANGUAGES)
    @pytest.mark.parametrize("kind", ["one", "many", "two"])
    def test_of_the_alternatives_the_true_one_alone_is_a_caption(self, kind, lang):
        rng = random.Random(0)
        for _ in range(60):
            scene = invent(kind, KINDS_SEEN, rng)
            for asked, choices, answer in alternatives(scene, lang):
                said = captions(scene, lang)
                assert len(set(choices)) == len(choices)
                assert [choice for choice in choices if choice in said] == [choices[answer]], asked


class TestQuestions:
    RED = Thing("red", "circle", 0.25, 0.25, 0.2, 0)
    BLUE = Thing("blue", "ring", 0.75, 0.25, 0.1, 0)

    def answers(self, asked) -> dict[str, str]:
        return {question.kind: question.answer for question in asked}

    def test_answers_about_one_many_and_two(self):
        rng = random.Random(0)
        one, many = Scene("one", (self.RED,), 0), Scene("many", (self.BLUE,) * 2, 0)
        assert self.answers(questions(one, "en", rng)) == {
            "colour": "Red.", "shape": "Circle.", "position": "Top left.", "size": "Big."
        }  # fmt: skip
        assert self.answers(questions(one, "zh", rng)) == {
            "colour": "红色。", "shape": "圆形。", "position": "左上角。", "size": "大。"
        }  # fmt: skip
        assert self.answers(questions(many, "en", rng)) == {"count": "Two."}
        assert self.answers(questions(many, "zh", rng)) == {"count": "两个。"}
        two = Scene("two", (self.RED, self.BLUE), 0, "left")
        seen = set()
        for seed in range(20):
            relation, colour, shape = questions(two, "en", random.Random(seed))
            assert relation.answer == "Left."
            assert relation.text.index("circle") < relation.text.index("ring") or "side of the ring" in relation.text
            left = "left" in colour.text
            assert colour.answer == ("Red." if left else "Blue.")
            assert ("left" in shape.text, shape.answer) == (left, "Circle." if left else "Ring.")
            seen.add(left)
        assert seen == {True, False}

    def test_answers_about_two_pictures(self):
        first, second = Scene("one", (self.RED,), 0), Scene("one", (self.BLUE,), 0)
        rng = random.Random(0)
        assert self.answers(comparisons(first, second, "en", rng)) == {
            "same colour": "No, different.", "same shape": "No, different.", "bigger": "The first."
        }  # fmt: skip
        assert self.answers(comparisons(second, first, "zh", rng))["bigger"] == "第二张。"
        assert self.answers(comparisons(first, first, "zh", rng)) == {"same colour": "相同。", "same shape": "相同。"}

    def test_pairs_are_alike_and_different_in_equal_parts(self):
        rng = random.Random(0)
        scenes = {str(number): invent("one", KINDS_HELD_OUT, rng) for number in range(300)}
        chosen = [(scenes[a].things[0], scenes[b].things[0]) for a, b in pairs(scenes, scenes, 100, rng)]
        assert sum(a.colour == b.colour for a, b in chosen) == 50
        assert sum(a.shape == b.shape for a, b in chosen) == 50
        assert all(a.size != b.size for a, b in chosen)

    def test_pairs_of_two_sets_have_one_of_each_in_any_order(self):
        rng = random.Random(0)
        named = {f"named {number}": invent("one", KINDS_SEEN, rng) for number in range(100)}
        nameless = {f"nameless {number}": invent("one", KINDS_NAMELESS, rng) for number in range(100)}
        chosen = pairs(named, nameless, 100, rng)
        assert {(a in named) + (b in named) for a, b in chosen} == {1}
        assert 30 < sum(a in named for a, _ in chosen) < 70
        both = named | nameless
        assert sum(both[a].things[0].shape == both[b].things[0].shape for a, b in chosen) == 50


class TestExamination:
    def test_each_answer_is_right_as_often_in_either_language(self):
        """Also for each pair of answers about two images, so that neither language lacks a kind of pair."""
        rng = random.Random(0)
        scenes = {str(number): invent("one", KINDS_HELD_OUT, rng) for number in range(200)}
        lines = [line for line in examination(scenes, 40, rng) if len(line["image"]) == 2]
        for lang, yes in (("en", "Yes"), ("zh", "相同")):
            answers = {kind: [] for kind in ("same colour", "same shape", "bigger")}
            for line in lines:
                if line["lang"] == lang:
                    answers[line["kind"]].append(line["answers"][0])
            colours, shapes = ([a.startswith(yes) for a in answers[f"same {what}"]] for what in ("colour", "shape"))
            assert Counter(zip(colours, shapes, strict=True)) == dict.fromkeys(product((True, False), repeat=2), 10)

    def test_pictures_take_turns_in_their_language(self):
        rng = random.Random(0)
        scenes = {str(number): invent("many", KINDS_HELD_OUT, rng) for number in range(8)}
        asked = [(line["image"], line["lang"]) for line in examination(scenes, 0, rng)]
        assert asked == [([str(number)], LANGUAGES[number % 2]) for number in range(8)]


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["make_demo_images.py", "--out_dir", str(folder), "--scale", "0.005"])
        main()
    return folder


def lines_of(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


class TestFiles:
    def run(self, monkeypatch, folder, *flags):
        monkeypatch.setattr("sys.argv", ["make_demo_images.py", "--out_dir", str(folder), "--scale", "0.005", *flags])
        main()

    def test_what_is_examined_was_never_learned(self, demo):
        """Checked in the files' texts, which name each image's colour and shape in one language or the other."""
        learned = {line["image"]: line["captions"] for line in lines_of(demo / "clip_captions.jsonl")}
        texts = [text for said in learned.values() for text in said]
        lessons = [line for name in ("pretrain_vlm", "sft_vlm") for line in lines_of(demo / f"{name}_data.jsonl")]
        texts += [turn["content"].lower() for line in lessons for turn in line["conversations"]]
        for colour, shape in KINDS_HELD_OUT:
            en, zh = f"{colour} {shape}", f"{COLOURS[colour][2]}{SHAPES[shape][1]}"
            assert not [text for text in texts if en in text or zh in text]
        shown = {name for line in lessons for name in line.get("image", "").split(",") if name}
        assert shown <= learned.keys()
        examined = {name for line in lines_of(demo / "eval_vlm.jsonl") for name in line["image"]}
        assert not examined & learned.keys()
        for line in lines_of(demo / "eval_clip.jsonl"):
            if line["kind"] == "colour and shape" and line["lang"] == "en":
                _, colour, shape = line["choices"][line["answer"]].split()
                assert (colour, shape) in KINDS_HELD_OUT

    def test_every_colour_and_every_shape_is_seen_and_examined(self):
        for kinds in (KINDS_SEEN, KINDS_HELD_OUT):
            assert {colour for colour, _ in kinds} == COLOURS.keys()
            assert {shape for _, shape in kinds} == SHAPES.keys()
        assert not set(KINDS_SEEN) & set(KINDS_HELD_OUT)

    def test_every_picture_named_is_there_and_lines_are_of_the_formats(self, demo):
        there = {path.name for path in (demo / "images").glob("*.jpg")}
        for line in lines_of(demo / "sft_vlm_data.jsonl"):
            names = line["image"].split(",") if "image" in line else []
            assert set(names) <= there
            assert line["conversations"][0]["content"].count("<image>") == len(names) or not names
        lessons = [line for line in lines_of(demo / "sft_vlm_data.jsonl") if "," in line.get("image", "")]
        assert {line["image"].count("nameless") for line in lessons} == {0, 1, 2}
        for line in lessons:  # colours without a name are not compared either
            about_colour = [turn for turn in line["conversations"] if re.search("colour|颜色", turn["content"])]
            assert bool(about_colour) == ("nameless" not in line["image"])
        kinds = {(line["kind"], line["lang"]) for line in lines_of(demo / "eval_vlm.jsonl")}
        for kind in ("colour", "shape", "position", "size", "count", "relation", "same colour", "same shape", "bigger"):
            assert {(kind, lang) for lang in LANGUAGES} <= kinds

    def test_a_second_run_changes_nothing_and_another_seed_everything(self, demo, monkeypatch, tmp_path, capsys):
        copy = tmp_path / "demo"
        shutil.copytree(demo, copy)
        before = {path: path.read_bytes() for path in copy.rglob("*") if path.is_file()}
        self.run(monkeypatch, copy)
        assert "written" not in capsys.readouterr().out
        assert {path: path.read_bytes() for path in copy.rglob("*") if path.is_file()} == before
        self.run(monkeypatch, copy, "--seed", "7")
        assert all(path.read_bytes() != before[path] for path in copy.rglob("*") if path.is_file())

    def test_a_run_cut_short_knows_its_own_pictures_again(self, demo, monkeypatch, tmp_path):
        copy = tmp_path / "demo"
        shutil.copytree(demo, copy)
        replace, replaced = Path.replace, []

        def cut_short(path, target):
            if len(replaced) == 20:
                raise KeyboardInterrupt
            replaced.append(replace(path, target))

        with monkeypatch.context() as patch:
            patch.setattr(Path, "replace", cut_short)
            with pytest.raises(KeyboardInterrupt):
                self.run(monkeypatch, copy, "--seed", "7")
        assert len(list((copy / "images").glob("*.jpg"))) < len(list((demo / "images").glob("*.jpg")))
        self.run(monkeypatch, copy)
        assert (copy / "images" / "manifest.json").read_text() == (demo / "images" / "manifest.json").read_text()
        for path in (demo / "images").glob("*.jpg"):
            assert (copy / "images" / path.name).read_bytes() == path.read_bytes()

    @pytest.mark.parametrize("name", ["images/learned_00001.jpg", "images/mine.jpg", "sft_vlm_data.jsonl"])
    def test_no_file_of_others_is_replaced(self, demo, monkeypatch, tmp_path, name):
        copy = tmp_path / "demo"
        shutil.copytree(demo, copy)
        (copy / name).write_bytes(b"mine")
        before = {path: path.read_bytes() for path in copy.rglob("*") if path.is_file()}
        with pytest.raises(UserError, match="was not written by this script"):
            self.run(monkeypatch, copy, "--seed", "7")
        assert {path: path.read_bytes() for path in copy.rglob("*") if path.is_file()} == before  # nor one of our own
