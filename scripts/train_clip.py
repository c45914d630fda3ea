"""Contrastive learning: a small CLIP from scratch, which learns to tell which caption belongs to which picture.

    python scripts/train_clip.py              learns from dataset/demo/clip_captions.jsonl, writes out/demo/clip/

Two networks share one embedding space (Radford et al. 2021, arXiv:2103.00020): a vision transformer embeds a picture, a
text transformer a caption. In a batch every picture is compared with every caption, and the loss is that of picking the
matching one. Nothing tells the network what a colour or a star is: it must see them to tell captions apart. The result
is a `transformers` CLIP folder, whose vision half is the tower of the vision-language model.

The language model reads the tower's patch tokens, but CLIP's own loss uses the class token and does not train the patch
tokens of the last layer. So here the mean of the patch tokens is trained to match the caption as well.

At the end it is tested zero-shot on pictures of objects it never saw: which of several captions is nearest?
"""

import math
import random
import shutil
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import _repo  # noqa: F401  (lets `python scripts/train_clip.py` find the packages)
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor
from transformers import CLIPConfig, CLIPModel, PreTrainedTokenizerFast

from dataset.jsonl import BadRecord, DataError, Ignored, JsonlReader, named_counts
from dataset.pictures import check_pictures, refuse_faulty
from dataset.record_keys import Keys
from model.images import ImageError, default_processor, read_image, to_pixels
from trainer.argument_types import BooleanFlag, positive_float, positive_int
from trainer.arguments import ROOT, Parser, add_device_argument
from trainer.device import DTYPES, default_dtype, pick_device
from trainer.errors import UserError, print_notice, run_main
from trainer.files import real_place, require_utf8, save_json
from trainer.muon import Muon
from trainer.schedule import OptimizerPair, cosine_schedule, set_learning_rate

DEMO = ROOT / "dataset" / "demo"
POSITION = 0.3  # initial standard deviation of the row and column embeddings of a patch
OFFERED = ("bfloat16", "float32")  # float16 would want a gradient scaler
WORDS = 500  # entries of the captions' own byte-level BPE; 256 of them are the bytes


def get_args():
    parser = Parser(__doc__)
    parser.add_argument("--data_path", type=Path, default=DEMO / "clip_captions.jsonl", help='{"image", "captions"}')
    parser.add_argument("--eval_path", type=Path, default=DEMO / "eval_clip.jsonl", help="number of answer choices")
    parser.add_argument("--images_path", type=Path, default=DEMO / "images")
    parser.add_argument(
        "--skip_bad_lines", action=BooleanFlag, help="count bad lines and broken pictures instead of stopping"
    )
    parser.add_argument("--out_dir", type=Path, default=ROOT / "out" / "demo" / "clip", help="output folder")
    parser.add_argument("--overwrite", action=BooleanFlag, help="replace the folder of an earlier run")
    parser.add_argument("--image_size", type=positive_int, default=64, help="image side in pixels")
    parser.add_argument("--patch_size", type=positive_int, default=16)
    parser.add_argument(
        "--width", type=positive_int, default=192, help="width of both encoders and of their shared space"
    )
    parser.add_argument(
        "--layers", type=positive_int, default=4, help="layers of the vision encoder; the text encoder has half as many"
    )
    parser.add_argument("--steps", type=positive_int, default=1000)
    parser.add_argument("--batch_size", type=positive_int, default=256)
    parser.add_argument("--learning_rate", type=positive_float, default=1.5e-3)
    parser.add_argument("--warmup_iters", type=positive_int, default=50)
    parser.add_argument("--log_interval", type=positive_int, default=50)
    add_device_argument(parser)
    parser.add_argument("--dtype", choices=OFFERED, help="autocast precision (default: bfloat16 if supported)")
    parser.add_argument("--seed", type=int, default=42)
    return parser.parse_args()


def info_nce(images: Tensor, texts: Tensor, scale: Tensor, true: Tensor) -> Tensor:
    """Symmetric InfoNCE (van den Oord et al. 2018, arXiv:1807.03748; in CLIP's form).

    The similarity of image i and caption j is scale * cos(i, j). For an image, the captions are classes, and the
    matching ones are right; for a caption, the images are. If several are right, the target is divided among them (as
    in supervised contrastive learning, Khosla et al. 2020, arXiv:2004.11362): CLIP, which lacks this information,
    treats only an image's own caption as right, and "a star" as wrong for every other star.

    Args:
        images, texts: (batch, width), of any length; pair i is images[i], texts[i].
        scale: the inverse temperature, learned.
        true: bool (batch, batch), True if caption j matches image i; the diagonal is True.

    Returns:
        the mean of both cross-entropies, nats, fp32 scalar.
    """
    similarity = scale * F.normalize(images.float(), dim=-1) @ F.normalize(texts.float(), dim=-1).T
    from_images = -(true / true.sum(1, keepdim=True) * similarity.log_softmax(1)).sum(1).mean()
    from_texts = -(true / true.sum(0, keepdim=True) * similarity.log_softmax(0)).sum(0).mean()
    return (from_images + from_texts) / 2


def picture_vectors(clip: CLIPModel, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Pixels (images, 3, H, W) -> embeddings of the class token, as in CLIP, and of the mean of the patch tokens, each
    (images, width)."""
    seen = clip.vision_model(pixel_values=pixels)
    patches = clip.vision_model.post_layernorm(seen.last_hidden_state[:, 1:].mean(1))
    return clip.visual_projection(seen.pooler_output), clip.visual_projection(patches)


def caption_vectors(clip: CLIPModel, tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> Tensor:
    """Captions -> their embeddings (captions, width)."""
    batch = tokenizer(texts, padding=True, return_tensors="pt").to(clip.device)
    hidden = clip.text_model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    return clip.text_projection(hidden.pooler_output)


# --------------------------------------------------------------------------------------------------------- data


CAPTIONS = Keys(("image", "captions"))
CHOICES = Keys(("image", "kind", "lang", "choices", "answer"))


def caption_record(record: dict, ignored: Ignored) -> tuple[str, list[str]]:
    CAPTIONS.check(record, ignored)
    image, texts = record["image"], record["captions"]
    if not isinstance(image, str) or not isinstance(texts, list) or not all(isinstance(t, str) and t for t in texts):
        raise BadRecord('not {"image": name, "captions": [text, …]}')
    if not texts:
        raise BadRecord('"captions" is empty')
    return image, texts


def choice_record(record: dict, ignored: Ignored) -> tuple[str, str, str, list[str], int]:
    CHOICES.check(record, ignored)
    if not isinstance(record["image"], str):
        raise BadRecord('"image" is not a name')
    return tuple(record[key] for key in CHOICES.needed)


def read_lines(path: Path, parse: Callable[[dict, Ignored], tuple], args) -> list[tuple]:
    """The results of `parse` for the lines of a file, the image's name first; all images exist and are whole.

    Raises:
        DataError: a line or its image is bad, and --skip_bad_lines was not given; or no line is good.
    """
    pictures = check_pictures(path, args.images_path, lambda record, ignored: [parse(record, ignored)[0]])
    faults = {name: picture.fault for name, picture in pictures.items() if picture.fault}

    def checked(record: dict, ignored: Ignored) -> tuple:
        line = parse(record, ignored)
        refuse_faulty(line[:1], args.images_path, faults)
        return line

    reader = JsonlReader(path, checked, args.skip_bad_lines)
    lines = list(reader)
    if reader.ignored:
        print_notice(f"{path}: ignored keys: {named_counts(reader.ignored)}")
    if reader.bad_lines:
        print(f"{path}: {reader.bad_lines:,} bad lines skipped, the first: {reader.bad_reports[0]}")
    return lines


def load_pictures(names: list[str], args) -> Tensor:
    """All images, preprocessed for the tower, fp16 (images, 3, H, W): they fit in memory, and are read once."""
    processor = default_processor(args.image_size)
    try:
        return torch.cat([to_pixels(processor, [read_image(args.images_path / name)]).half() for name in names])
    except ImageError as error:
        raise DataError(str(error)) from error


def train_caption_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """A small byte-level BPE with CLIP's two special tokens; the text embedding is read at the end token."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    backend.decoder = decoders.ByteLevel()
    marks = ["<|startoftext|>", "<|endoftext|>", "<pad>"]  # the end is not 2, by which transformers knows an old CLIP
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(
        texts,
        trainers.BpeTrainer(vocab_size=WORDS, special_tokens=marks, initial_alphabet=alphabet, show_progress=False),
    )
    start, end, pad = marks
    backend.post_processor = processors.TemplateProcessing(
        single=f"{start} $A {end}", special_tokens=[(start, 0), (end, 1)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=start, eos_token=end, pad_token=pad)


# ------------------------------------------------------------------------------------------------------ network


def make_clip(args, tokenizer: PreTrainedTokenizerFast, longest: int) -> CLIPModel:
    """The two networks, of equal width, with heads of size 32; captions have at most `longest` tokens."""
    half = {"hidden_size": args.width, "intermediate_size": 4 * args.width, "num_attention_heads": args.width // 32}
    vision = {"image_size": args.image_size, "patch_size": args.patch_size, "num_hidden_layers": args.layers}
    text = {
        "vocab_size": len(tokenizer),
        "max_position_embeddings": longest,
        "num_hidden_layers": max(1, args.layers // 2),
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    clip = CLIPModel(CLIPConfig(vision_config=half | vision, text_config=half | text, projection_dim=args.width))
    clip.set_attn_implementation("eager")  # for so few tokens twice as fast on a CPU as SDPA, whose backward is slow
    # transformers' position embeddings are a hundredth of the patches', too small to learn positions in minutes
    side = args.image_size // args.patch_size
    across, down = torch.randn(side, args.width) * POSITION, torch.randn(side, 1, args.width) * POSITION
    clip.vision_model.embeddings.position_embedding.weight.data[1:] = (across + down).flatten(0, 1)
    return clip


@torch.no_grad()
def zero_shot(clip: CLIPModel, tokenizer: PreTrainedTokenizerFast, pixels: Tensor, exam: list) -> dict[str, float]:
    """The share of images whose true caption is the nearest of the choices, for each language and kind.

    Args:
        pixels: (images, 3, H, W); exam: for each image (kind, lang, choices, index of the true one).
    """
    clip.eval()
    counts = defaultdict(lambda: [0, 0])
    texts = sorted({text for _, _, choices, _ in exam for text in choices})
    known = dict(
        zip(
            texts,
            torch.cat([caption_vectors(clip, tokenizer, texts[i : i + 512]) for i in range(0, len(texts), 512)]),
            strict=True,
        )
    )
    seen = torch.cat([picture_vectors(clip, batch.float().to(clip.device))[0] for batch in pixels.split(256)])
    for picture, (kind, lang, choices, answer) in zip(seen, exam, strict=True):
        offered = F.normalize(torch.stack([known[text] for text in choices]).float(), dim=-1)
        counts[lang, kind, len(choices)][0] += int((offered @ picture.float()).argmax()) == answer
        counts[lang, kind, len(choices)][1] += 1
    return {f"{lang}: {kind}, one of {n}": right / asked for (lang, kind, n), (right, asked) in sorted(counts.items())}


def main():
    args = get_args()
    if args.image_size % args.patch_size or args.width % 32:
        raise UserError("--image_size must be a multiple of --patch_size, and --width of 32")
    require_utf8(real_place(args.out_dir), "--out_dir")
    if args.out_dir.exists() and not is_ours(args.out_dir):
        raise UserError(f"{args.out_dir} already exists and was not written by this script: give another --out_dir")
    if args.out_dir.exists() and not args.overwrite:
        raise UserError(f"{args.out_dir} already exists: use --overwrite to replace it")
    device = pick_device(args.device)
    usual = default_dtype(device)
    dtype = DTYPES[args.dtype or (usual if usual in OFFERED else "float32")]
    torch.manual_seed(args.seed)
    rng = random.Random(args.seed)

    # Data
    names, captions = zip(*read_lines(args.data_path, caption_record, args), strict=True)
    exam = read_lines(args.eval_path, choice_record, args)
    known = [frozenset(texts) for texts in captions]
    pixels, exam_pixels = load_pictures(names, args), load_pictures([line[0] for line in exam], args)
    tokenizer = train_caption_tokenizer([text for texts in captions for text in texts])
    every = [text for texts in captions for text in texts] + [text for _, _, _, choices, _ in exam for text in choices]
    longest = max(len(ids) for ids in tokenizer(sorted(set(every)))["input_ids"])

    # Networks and optimizer
    clip = make_clip(args, tokenizer, longest).to(device)
    hidden = [p for key, p in clip.named_parameters() if ".layers." in key and p.dim() == 2]
    others = [p for key, p in clip.named_parameters() if not (".layers." in key and p.dim() == 2)]
    optimizer = OptimizerPair(
        Muon(hidden, args.learning_rate),
        torch.optim.AdamW(others, lr=args.learning_rate, betas=(0.9, 0.98), weight_decay=0.0, fused=True),
    )
    millions = [sum(p.numel() for p in half.parameters()) / 1e6 for half in (clip.vision_model, clip.text_model)]
    print(
        f"{len(names):,} pictures; vision {millions[0]:.2f} M, text {millions[1]:.2f} M parameters, {device}, {dtype}"
    )

    # Loop
    started, order = time.monotonic(), []
    for step in range(args.steps):
        set_learning_rate(optimizer, cosine_schedule(step, args.steps, args.warmup_iters, args.learning_rate))
        if len(order) < args.batch_size:
            order += rng.sample(range(len(names)), len(names))
        batch, order = order[: args.batch_size], order[args.batch_size :]
        texts = [rng.choice(captions[i]) for i in batch]
        true = torch.tensor([[text in known[i] for text in texts] for i in batch], device=device)
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            by_class, by_patches = picture_vectors(clip, pixels[batch].float().to(device))
            words = caption_vectors(clip, tokenizer, texts)
        scale = clip.logit_scale.exp()
        loss = (info_nce(by_class, words, scale, true) + info_nce(by_patches, words, scale, true)) / 2
        loss.backward()
        torch.nn.utils.clip_grad_norm_(clip.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            clip.logit_scale.clamp_(max=math.log(100))  # as CLIP does: sharper than that is unstable
        if (step + 1) % args.log_interval == 0 or step + 1 == args.steps:
            speed = (step + 1) * args.batch_size / (time.monotonic() - started)
            print(
                f"step {step + 1}/{args.steps}  loss {loss.item():.4f}  scale {scale.item():.1f}  {speed:,.0f} pairs/s",
                flush=True,
            )

    # Examination
    shares = zero_shot(clip, tokenizer, exam_pixels, [line[1:] for line in exam])
    print("zero-shot, unseen objects:")
    for name, share in shares.items():
        print(f"  {name:<40}{share:>8.1%}")
    save(clip, tokenizer, args, shares)
    print(f"{args.out_dir}: a transformers CLIP, for --vision_model")


def is_ours(folder: Path) -> bool:
    """Whether a folder was written by `save` and contains nothing else."""
    return (folder / "zero_shot.json").is_file() and not any(path.is_dir() for path in folder.iterdir())


def save(clip: CLIPModel, tokenizer: PreTrainedTokenizerFast, args, shares: dict[str, float]) -> None:
    """Write the folder beside its final place, then move it there; an earlier one is removed afterwards."""
    place = real_place(args.out_dir)  # where a link leads to: a folder is moved within a disk only
    partial, earlier = (place.with_name(f".{place.name}.{end}") for end in ("partial", "earlier"))
    for left in (partial, earlier):
        shutil.rmtree(left, ignore_errors=True)
    try:
        clip.float().cpu().save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        default_processor(args.image_size).save_pretrained(partial)
        save_json(shares, partial / "zero_shot.json")
        if place.exists():
            place.rename(earlier)
        partial.rename(place)
        shutil.rmtree(earlier, ignore_errors=True)
    except OSError as error:
        raise UserError(f"cannot write {args.out_dir}: {error.strerror or error}") from error


if __name__ == "__main__":
    run_main(main)
