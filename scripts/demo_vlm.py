"""Vision for the demo's model in minutes: pictures, a tower, two stages, a test. `make demo-vlm` runs it.

Everything is in dataset/demo/ and out/demo/; results of an earlier call are reused, and interrupted training continues
where it stopped; if the pictures change, everything is trained again. If the language model is missing,
scripts/demo.py trains it first.

The test shows pictures of objects whose colour and shape no training picture combines. Beside each score are two that
need no vision: that of the most frequent answer, and that with the pictures shuffled among the questions of a kind. If
the second is clearly above the first, the questions give the answer away.
"""

import json
import time

import _own_python  # noqa: F401  (makes .venv where packages are missing, and goes on there)
import _repo  # noqa: F401  (lets `python scripts/demo_vlm.py` find the packages)

from model import MiniMindLM
from scripts.demo.exam import answer, open_model, read_lines, run
from scripts.demo.first_model import EXAMS
from scripts.demo.scoring import tally
from scripts.demo.settings import DATA, OUT
from scripts.demo.vision_exam import look, shares, shuffled
from scripts.make_demo_data import file_digest
from trainer.arguments import Parser
from trainer.device import pick_device
from trainer.errors import run_main
from trainer.files import save_json
from trainer.loading import load_vlm_for_inference
from trainer.vision import open_vision
from trainer.weights import read_settings

SIZE = ("--dim", "256", "--n_layers", "8")
PICTURES = TOWER = ()  # each script's own defaults are the demo's
TRAINING = (
    *("--max_seq_len", "256", "--batch_size", "8", "--accumulation_steps", "1", "--warmup_iters", "20"),
    *("--optimizer", "muon", "--epochs", "1", "--eval_interval", "0", "--cache_features"),
)
PRETRAIN = ("--learning_rate", "2e-3", "--unfreeze_last", "1", "--max_steps", "150")
SFT = ("--learning_rate", "1e-3")
BARS = {
    "colour": 0.9,
    "shape": 0.9,
    "position": 0.9,
    "count": 0.8,
    "same colour": 0.85,
    "same shape": 0.85,
    "bigger": 0.85,
}
TEXT_BAR = 0.03  # what the language model may lose on questions without a picture


def text_ability(model: MiniMindLM, tokenizer) -> dict[str, float]:
    """The shares of right answers to the demo's questions without images, by language."""
    questions = [question for exam in EXAMS for question in read_lines(DATA / f"eval_{exam}.jsonl")]
    replies, _ = answer(model, tokenizer, [question["question"] for question in questions])
    return {lang: right / of for (lang, kind), (right, of) in tally(questions, replies).items() if kind == "all"}


def show_examination() -> dict:
    """Ask every question, print a summary, and return the figures."""
    model, tokenizer, processor = load_vlm_for_inference(OUT / f"sft_vlm_{SIZE[1]}.pth", OUT / "clip")
    model.to(pick_device(None))
    exam = read_lines(DATA / "eval_vlm.jsonl")
    replies = look(model, tokenizer, processor, DATA / "images", exam)
    blind = look(model, tokenizer, processor, DATA / "images", shuffled(exam))
    table = shares(exam, replies, blind)
    print("\nPictures with colour-shape pairs never seen in training (greedy, exact match):")
    print(f"{'lang':<6}{'kind':<16}{'asked':>6}{'right':>9}{'bar':>7}{'majority':>10}{'shuffled':>10}")
    for (lang, kind), row in sorted(table.items()):
        bar = f"{BARS[kind]:.0%}" if kind in BARS else ""
        missed = " missed" if kind in BARS and row["right"] < BARS[kind] else ""
        guessed = " too high: the question gives the answer away" if row["shuffled"] > row["limit"] else ""
        shown = f"{row['right']:>9.1%}{bar:>7}{row['majority']:>10.1%}{row['shuffled']:>10.1%}"
        print(f"{lang:<6}{kind:<16}{row['asked']:>6}{shown}{missed}{guessed}")

    before = text_ability(*open_model(OUT / f"full_sft_{SIZE[1]}.pth"))
    after = text_ability(model, tokenizer)
    print("\nText-only questions, before and after vision training (may lose 3 points):")
    for lang in before:
        lost = before[lang] - after[lang]
        print(f"  {lang}: {before[lang]:.1%} -> {after[lang]:.1%}{' missed' if lost > TEXT_BAR else ''}")
    return {
        "pictures": {f"{lang}/{kind}": row for (lang, kind), row in table.items()},
        "text_before": before,
        "text_after": after,
    }


def main():
    Parser(__doc__).parse_args()
    out = ("--out_dir", str(OUT))
    if not (OUT / f"full_sft_{SIZE[1]}.pth").is_file():
        run("scripts/demo.py")
    started = time.monotonic()
    run("scripts/make_demo_images.py", "--out_dir", str(DATA), *PICTURES)
    data = ("--images_path", str(DATA / "images"), "--data_path")
    shown = {"pictures": file_digest(DATA / "images" / "manifest.json")}
    seen = OUT / "clip" / "seen.json"  # which pictures the tower there has learned from
    if not seen.is_file() or json.loads(seen.read_text(encoding="utf-8")) != shown:
        captions, exam = str(DATA / "clip_captions.jsonl"), str(DATA / "eval_clip.jsonl")
        to = ("--eval_path", exam, "--out_dir", str(OUT / "clip"), "--overwrite")
        run("scripts/train_clip.py", *data, captions, *to, *TOWER)
        save_json(shown, seen)
    tower = open_vision(str(OUT / "clip")).hash
    eyes = ("--vision_model", str(OUT / "clip"))
    for stage, flags in (("pretrain_vlm", PRETRAIN), ("sft_vlm", SFT)):
        lines = str(DATA / f"{stage}_data.jsonl")
        earlier = read_settings(OUT / f"{stage}_{SIZE[1]}.pth") or {"vision_tower": tower}
        go_on = "--resume" if earlier["vision_tower"] == tower else "--overwrite"  # by another tower: it is of no use
        run(f"train_{stage}.py", *SIZE, *out, *eyes, *data, lines, *TRAINING, *flags, go_on)
    save_json(show_examination(), OUT / "accuracy_vlm.json")
    print(f"\nthis call took {(time.monotonic() - started) / 60:.1f} minutes, not counting the language model")
    sheet = ("--out", str(OUT / "contact_sheet.png"), "--data_dir", str(DATA))
    run("scripts/contact_sheet.py", *sheet, *out, *SIZE[:2])
    run("eval_vlm.py", *SIZE, *out, *eyes, "--temperature", "0", "--max_new_tokens", "48")


if __name__ == "__main__":
    run_main(main)
