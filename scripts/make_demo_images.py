"""Draw the demo's pictures and write their captions and questions: for the tower, both VLM stages and the tests.

    python scripts/make_demo_images.py                    writes dataset/demo/images/ and five jsonl files beside it
    python scripts/make_demo_images.py --eval_images      draws the few pictures of dataset/eval_images/ instead

    clip_captions.jsonl       {"image", "captions": [...]}                       for scripts/train_clip.py
    eval_clip.jsonl           {"image", "kind", "lang", "choices", "answer"}     and its test
    pretrain_vlm_data.jsonl   {"image", "conversations"}: descriptions           for train_pretrain_vlm.py
    sft_vlm_data.jsonl        the same: questions, two pictures at once, text    for train_sft_vlm.py
    eval_vlm.jsonl            {"image": [...], "question", "answers", "kind", "lang"}

The same seed gives the same bytes. No file that this script did not write is replaced. Test pictures show only pairs of
colour and shape that no training picture has (`scripts.demo.scenes.is_held_out`).
"""

import io
import json
import random
from collections import defaultdict
from collections.abc import Sequence
from itertools import product
from pathlib import Path

import _repo  # noqa: F401  (lets `python scripts/make_demo_images.py` find the packages)

from scripts.demo.scene_texts import DESCRIBE, Question, alternatives, captions, comparisons, questions
from scripts.demo.scenes import KINDS_HELD_OUT, KINDS_NAMELESS, KINDS_SEEN, LANGUAGES, Scene, draw, invent
from scripts.make_demo_data import as_jsonl, build, chat, check_ours, exam, sentence, sha256, write
from trainer.argument_types import BooleanFlag, positive_float
from trainer.arguments import ROOT, Parser
from trainer.errors import UserError, run_main
from trainer.files import replacing

SIDE = 96  # pixels
SCENES = {"one": 6000, "many": 3000, "two": 3000}  # to learn from…
NAMELESS = {"one": 3200, "many": 1000, "two": 1000}  # …and of things in colours that have no name
EXAMINED = 200  # scenes of each kind, and comparisons, in each language
COMPARED = 10000  # pairs of pictures to learn from, and a third as many with one without a name, and with two
DESCRIBED = 3000  # descriptions, so that it can still give them
TEXT_LINES = 17000  # chats without a picture, most of them twice, so that the language model forgets nothing
MARKER = "<image>\n"


def invent_all(counts: dict[str, int], kinds: Sequence[tuple[str, str]], name: str, rng: random.Random):
    """{file name: scene}, with the given number of each kind."""
    scenes = [invent(kind, kinds, rng) for kind, count in counts.items() for _ in range(count)]
    return {f"{name}_{number:05d}.jpg": scene for number, scene in enumerate(scenes)}


def descriptions(scenes: dict[str, Scene], rng: random.Random) -> list[dict]:
    lines = []
    for name, scene in scenes.items():
        lang = rng.choice(LANGUAGES)
        described = captions(scene, lang)[0]
        question = MARKER + rng.choice(DESCRIBE[lang])
        lines.append({"image": name} | chat(question, sentence(described[0].upper() + described[1:], lang)))
    rng.shuffle(lines)
    return lines


def conversation(names: Sequence[str], asked: Sequence[Question], rng: random.Random) -> dict:
    """Questions and answers about the same images, in random order."""
    turns = [text for question in rng.sample(asked, len(asked)) for text in (question.text, question.answer)]
    turns[0] = MARKER * len(names) + turns[0]
    return {"image": ",".join(names)} | chat(*turns)


def pairs(scenes: dict[str, Scene], others: dict[str, Scene], count: int, rng: random.Random) -> list[tuple[str, str]]:
    """Names of two images of one thing each, one from `scenes` and one from `others`, in random order, one big and one
    small: a quarter of the pairs have the same colour and shape, a quarter each only the same colour, only the same
    shape, and neither."""
    alike, alike_there = _of_one_thing(scenes), _of_one_thing(others)
    kinds = [
        [(a, b) for a, b in product(alike, alike_there) if (a[0] == b[0], a[1] == b[1]) == same and a[2] != b[2]]
        for same in product((True, False), repeat=2)
    ]
    kinds = [kind for kind in kinds if kind]  # among very few pictures, or of no common colour, some are missing
    chosen = [rng.choice(kinds[number % len(kinds)]) for number in range(count)]
    return [tuple(rng.sample([rng.choice(alike[a]), rng.choice(alike_there[b])], 2)) for a, b in chosen]


def _of_one_thing(scenes: dict[str, Scene]) -> dict[tuple[str | None, str, str], list[str]]:
    """The names of the images of a single thing, by its colour, shape and size."""
    alike = defaultdict(list)
    for name, scene in scenes.items():
        if scene.kind == "one":
            alike[scene.things[0].colour, scene.things[0].shape, scene.things[0].size].append(name)
    return alike


def lessons(scenes: dict[str, Scene], compared: int, described: int, text_lines: int, rng: random.Random) -> list[dict]:
    """The SFT lines: all questions about each image, about pairs of images, descriptions, and chats without images."""
    lines = [conversation([name], questions(scene, rng.choice(LANGUAGES), rng), rng) for name, scene in scenes.items()]
    named = {name: scene for name, scene in scenes.items() if scene.things[0].colour}
    nameless = {name: scene for name, scene in scenes.items() if name not in named}
    compared_with = [(named, named, compared), (named, nameless, compared // 3), (nameless, nameless, compared // 3)]
    for first, second in (pair for which in compared_with for pair in pairs(*which, rng)):
        asked = comparisons(scenes[first], scenes[second], rng.choice(LANGUAGES), rng)
        lines.append(conversation([first, second], asked, rng))
    lines += descriptions(dict(rng.sample(list(scenes.items()), described)), rng)
    texts = 2 * build(rng.randrange(1000))["sft_mini_512.jsonl"]
    lines += rng.sample(texts, min(text_lines, len(texts)))
    rng.shuffle(lines)
    return lines


def examination(scenes: dict[str, Scene], compared: int, rng: random.Random) -> list[dict]:
    """Each question about each image, half of the images per language, and questions about pairs."""
    asked = [
        ([name], question)
        for number, (name, scene) in enumerate(scenes.items())
        for question in questions(scene, LANGUAGES[number % 2], rng)
    ]
    asked += [
        ([first, second], question)
        for number, (first, second) in enumerate(pairs(scenes, scenes, 2 * compared, rng))
        for question in comparisons(scenes[first], scenes[second], LANGUAGES[number // 4 % 2], rng)
    ]
    return [{"image": names} | exam(q.text, (q.answer,), q.kind, q.lang) for names, q in asked]


def zero_shot(scenes: dict[str, Scene]) -> list[dict]:
    """For each image and language: which of these captions is true?"""
    return [
        {"image": name, "kind": kind, "lang": lang, "choices": choices, "answer": answer}
        for name, scene in scenes.items()
        for lang in LANGUAGES
        for kind, choices, answer in alternatives(scene, lang)
    ]


def as_jpeg(scene: Scene, side: int = SIDE) -> bytes:
    file = io.BytesIO()
    draw(scene, side).save(file, "JPEG", quality=92)
    return file.getvalue()


def eval_images(rng: random.Random) -> dict[str, bytes]:
    """A few larger images for eval_vlm.py, {file name: JPEG}; the names say what they show."""
    kinds = ("one", "many", "two", "one", "many", "two", "one", "one")
    pairs = rng.sample(KINDS_HELD_OUT, len(kinds))  # so that no pair fills the folder
    scenes = [invent(kind, KINDS_HELD_OUT if kind == "two" else [pairs.pop()], rng) for kind in kinds]
    names = (f"{number} {captions(scene, 'en')[0]}".replace(" ", "_") for number, scene in enumerate(scenes, 1))
    return {f"{name}.jpg": as_jpeg(scene, 224) for name, scene in zip(names, scenes, strict=True)}


def write_images(images: dict[str, bytes], folder: Path) -> str:
    """Write images, and a manifest of them; returns a line about them.

    Raises:
        UserError: as in `check_ours` for every file there, and then nothing is written; or they cannot be written.
    """
    digests = {name: sha256(content) for name, content in images.items()}
    found = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    pictures = [name for name in found if name != "manifest.json" and not name.startswith(".")]
    there = check_ours({name: digests.get(name) for name in pictures}, folder)
    missing = {name: content for name, content in images.items() if there.get(name) != digests[name]}
    old = [name for name, digest in there.items() if digest != digests.get(name)]
    try:
        if missing or old:
            folder.mkdir(parents=True, exist_ok=True)
            for name in old:  # before the manifest, and that before the new: a run cut short knows its own files again
                (folder / name).unlink()
            with replacing(folder / "manifest.json") as temporary:
                temporary.write_text(json.dumps(digests) + "\n", encoding="utf-8")
            temporary = folder / ".picture.tmp"
            for name, content in missing.items():  # whole or not there; not flushed one by one, which takes minutes
                temporary.write_bytes(content)
                temporary.replace(folder / name)
    except OSError as error:
        raise UserError(
            f"cannot write {folder}: {error.strerror}; free some space and run the same command again"
        ) from error
    return f"{'images/':<24}{len(images):>8} files  {'written' if missing else 'unchanged'}"


def main():
    parser = Parser(__doc__)
    parser.add_argument("--out_dir", type=Path, default=ROOT / "dataset" / "demo")
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument(
        "--scale", type=positive_float, default=1.0, help="fraction of the default number of pictures and lines"
    )
    parser.add_argument("--eval_images", action=BooleanFlag, help="draw dataset/eval_images/ only")
    args = parser.parse_args()
    rng = random.Random(args.seed)
    if args.eval_images:
        print(write_images(eval_images(rng), ROOT / "dataset" / "eval_images"))
        return

    def some(count: int) -> int:
        return max(8, round(count * args.scale))

    learned = invent_all({kind: some(count) for kind, count in SCENES.items()}, KINDS_SEEN, "learned", rng)
    learned |= invent_all({kind: some(count) for kind, count in NAMELESS.items()}, KINDS_NAMELESS, "nameless", rng)
    examined = invent_all(dict.fromkeys(SCENES, 2 * some(EXAMINED)), KINDS_HELD_OUT, "examined", rng)
    images = {name: as_jpeg(scene) for name, scene in (learned | examined).items()}
    said = {name: [text for lang in LANGUAGES for text in captions(scene, lang)] for name, scene in learned.items()}
    files = as_jsonl(
        {
            "clip_captions.jsonl": [{"image": name, "captions": texts} for name, texts in said.items()],
            "eval_clip.jsonl": zero_shot(examined),
            "pretrain_vlm_data.jsonl": descriptions(learned, rng),
            "sft_vlm_data.jsonl": lessons(learned, some(COMPARED), some(DESCRIBED), some(TEXT_LINES), rng),
            "eval_vlm.jsonl": examination(examined, some(EXAMINED), rng),
        }
    )
    check_ours({name: sha256(content) for name, content in files.items()}, args.out_dir)  # before a picture goes
    print(write_images(images, args.out_dir / "images"))
    print("\n".join(write(files, args.out_dir)))


if __name__ == "__main__":
    run_main(main)
