"""A sheet of pictures, what was asked of them and what the demo's model answered, for the README.

    python scripts/contact_sheet.py --out docs/images/demo_vlm.png           after `make demo-vlm`

Questions are drawn at random from the test's English ones (no font that comes with Python has Chinese), whether
answered right or wrong.
"""

import math
import random
import textwrap
from pathlib import Path

import _repo  # noqa: F401  (lets `python scripts/contact_sheet.py` find the packages)
import numpy as np
from PIL import Image

from scripts.demo.exam import read_lines
from scripts.demo.scoring import is_right
from scripts.demo.vision_exam import look
from trainer.argument_types import positive_int
from trainer.arguments import ROOT, Parser
from trainer.device import pick_device
from trainer.errors import UserError, run_main
from trainer.files import replacing
from trainer.vision import load_vlm, open_vision
from trainer.weights import load_tokenizer


def draw_sheet(exam: list[dict], replies: list[str], images_path: Path, columns: int, path: Path) -> None:
    """Write a PNG with one cell per question, its image or images above it."""
    from matplotlib.figure import Figure  # not pyplot, which keeps every figure and wants a display

    rows = math.ceil(len(exam) / columns)
    figure = Figure(figsize=(2.1 * columns, 2.7 * rows), dpi=110, layout="constrained")
    cells = figure.subplots(rows, columns, squeeze=False).flat
    for cell in cells:
        cell.axis("off")
    for cell, question, reply in zip(figure.axes, exam, replies, strict=False):  # the last row may have cells to spare
        pictures = [np.asarray(Image.open(images_path / name)) for name in question["image"]]
        cell.imshow(np.concatenate([np.pad(p, ((2, 2), (2, 2), (0, 0)), constant_values=255) for p in pictures], 1))
        right = is_right(reply, question["answers"])
        cell.set_title(textwrap.fill(question["question"], 26), fontsize=8, loc="left", y=-0.02, va="top")
        reply = textwrap.shorten(reply, 40, placeholder="…")
        answer = reply if right else f"{reply}  (right: {question['answers'][0]})"
        cell.text(0, 1.02, answer, transform=cell.transAxes, fontsize=9, color="darkgreen" if right else "firebrick")
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png")


def main():
    parser = Parser(__doc__)
    parser.add_argument("--out", type=Path, default=ROOT / "out" / "demo" / "contact_sheet.png", help="PNG to write")
    parser.add_argument("--data_dir", type=Path, default=ROOT / "dataset" / "demo", help="eval_vlm.jsonl and images/")
    parser.add_argument("--out_dir", type=Path, default=ROOT / "out" / "demo", help="the model and clip/")
    parser.add_argument("--dim", type=positive_int, default=256)
    parser.add_argument("--count", type=positive_int, default=24)
    parser.add_argument("--columns", type=positive_int, default=6)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    exam_file = args.data_dir / "eval_vlm.jsonl"
    if not exam_file.is_file():
        raise UserError(f"{exam_file} is missing: run `make demo-vlm`")
    english = [question for question in read_lines(exam_file) if question["lang"] == "en"]
    exam = random.Random(args.seed).sample(english, min(args.count, len(english)))
    vision, tokenizer = open_vision(str(args.out_dir / "clip")), load_tokenizer()
    model = load_vlm(args.out_dir / f"sft_vlm_{args.dim}.pth", None, tokenizer, vision).to(pick_device(None)).eval()
    replies = look(model, tokenizer, vision.processor, args.data_dir / "images", exam)
    draw_sheet(exam, replies, args.data_dir / "images", args.columns, args.out)
    print(args.out)


if __name__ == "__main__":
    run_main(main)
