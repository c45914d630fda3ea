"""Show images to a vision-language model: those of a folder one by one, or your own; streamed answers.

python eval_vlm.py                                                  goes through dataset/eval_images/
python eval_vlm.py --image cat.jpg --prompt "What is this?"         one question (repeat --prompt for more)
python eval_vlm.py --model_mode 2 --image a.jpg --image b.jpg       several images in one question
"""

import time
from pathlib import Path

import trainer.start  # noqa: F401  (first of all: what to do where PyTorch, or a home folder, is missing)

from trainer.argument_types import BooleanFlag, text
from trainer.arguments import ROOT, Parser, add_device_argument, add_model_arguments, add_tower_argument
from trainer.errors import UserError, run_main
from trainer.inference_arguments import (
    VLM_STAGES,
    add_engine_arguments,
    add_sampling_arguments,
    add_stage_arguments,
    sampling_settings,
)
from trainer.talk import report_speed, room_for_prompt, show, stream_texts

SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"}
PROMPTS = {1: "请描述这张图片。", 2: "请比较这两张图片。"}  # by how many images


def get_args():
    parser = Parser(__doc__)
    add_stage_arguments(parser, VLM_STAGES)
    add_model_arguments(parser)
    add_tower_argument(parser)
    add_device_argument(parser)
    parser.add_argument(
        "--image", action="append", metavar="FILE", help="an image to show (may be repeated: shown together)"
    )
    parser.add_argument(
        "--image_dir",
        default=str(ROOT / "dataset" / "eval_images"),
        metavar="DIR",
        help="show a folder's images by name, one at a time; with --model_mode 2 in pairs",
    )
    parser.add_argument("--skip_bad_images", action=BooleanFlag, help="skip and count broken images in --image_dir")
    parser.add_argument(
        "--prompt", type=text, action="append", help="ask this instead of for a description (may be repeated)"
    )
    parser.add_argument("--system", type=text, default=None, help="system prompt (default: MiniMind's own)")
    add_sampling_arguments(parser)
    add_engine_arguments(parser)
    parser.add_argument(
        "--stream", action=BooleanFlag, default=True, help="print tokens as they are generated (default: on)"
    )
    return parser.parse_args()


def groups_of_images(args) -> list[list[Path]]:
    """The images to show, grouped by question; all exist and are whole.

    Raises:
        UserError: there are none; or one is damaged, and --skip_bad_images was not given.
    """
    if args.image:
        return [whole_images([Path(name) for name in args.image])]
    folder = Path(args.image_dir)
    if not folder.is_dir():
        raise UserError(f"--image_dir {folder} is not a folder; --image names a single file")
    images = sorted(path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES)
    images = whole_images(images, args.skip_bad_images)
    together = 2 if args.model_mode == 2 else 1
    if len(images) < together:
        raise UserError(
            f"--image_dir {folder} holds {len(images)} images, and --model_mode {args.model_mode} shows {together}"
        )
    return [images[i : i + together] for i in range(0, len(images), together)]


def whole_images(images: list[Path], skip: bool | None = None) -> list[Path]:
    """These images, without damaged ones if `skip`; None: skipping is not offered."""
    from dataset.pictures import picture_faults  # imported late, so that --help is quick

    faults = picture_faults(images)
    bad = [f"{image} {fault}" for image, fault in zip(images, faults, strict=True) if fault]
    if bad and not skip:
        choice = "" if skip is None else f" ({len(bad)} of {len(images)} images; --skip_bad_images skips them)"
        raise UserError(bad[0] + choice)
    if bad:
        print(f"{len(bad)} of {len(images)} images skipped, the first: {bad[0]}")
    return [image for image, fault in zip(images, faults, strict=True) if not fault]


def main():
    args = get_args()
    groups = groups_of_images(args)
    from model.images import prepare_chat, prompt_embeddings
    from model.inference.request import Request
    from trainer.device import pick_device
    from trainer.loading import load_vlm_by_flags, open_engine

    device = pick_device(args.device)
    model, tokenizer, processor = load_vlm_by_flags(args)
    model.to(device)
    engine = open_engine(model, tokenizer, args, slots=1)
    room = room_for_prompt(model.config.max_seq_len, args.max_new_tokens)
    system = [{"role": "system", "content": args.system}] if args.system else []
    for images in groups:
        for question in args.prompt or [PROMPTS[min(len(images), 2)]]:
            chat = [*system, {"role": "user", "content": [*images, question]}]
            try:
                prompt = prepare_chat(tokenizer, chat, model.config, processor, room)
            except ValueError as error:  # a broken image, or more of them than the model takes
                raise UserError(str(error)) from error
            print(f"\n{', '.join(path.name for path in images)}\n> {question}")
            started, pieces = time.monotonic(), []
            seen = prompt_embeddings(model, prompt)
            request = Request(prompt=prompt.input_ids[0].tolist(), embeddings=seen, **sampling_settings(args))
            texts = stream_texts(engine.stream(request), pieces)
            show(texts if args.stream else ["".join(texts)], reasoning=False, hide_thinking=False)
            report_speed(pieces, started)


if __name__ == "__main__":
    run_main(main)
