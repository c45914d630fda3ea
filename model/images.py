"""From image bytes and a chat to model inputs: pixels for the vision tower, and a prompt with image tokens."""

import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from transformers import CLIPImageProcessorPil, PreTrainedTokenizerFast

from model.chat import IMAGE_MARKER, IMAGE_PLACE, fit_history
from model.model_vlm import MiniMindVLM, VLMConfig

MOST_PIXELS = 2**26  # per image: 67 million, more than cameras produce; a quarter of a gigabyte when decoded
SENT_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")  # accepted as bytes, which may come from anybody
DRAWINGS = ("EPS", "WMF")  # vector formats that Pillow hands to external programs
BAND = 2**20  # pixels composited over white at a time
STRIP_RATIO = 8  # beyond this aspect ratio an image is cropped before resizing: the centre crop keeps less anyway


class ImageError(ValueError):
    """An image cannot be used; the message is one line that says which, and why."""


def read_image(source: bytes | Path, reduced: bool = False) -> Image.Image:
    """Load an image from bytes or a file: RGB, EXIF orientation applied, transparency over white.

    Takes the first frame of an animation. A JPEG with too many pixels is decoded at 1/2, 1/4 or 1/8 of its size.
    Bytes must be one of `SENT_FORMATS`, a file any format that Pillow decodes itself.

    Args:
        reduced: decode a JPEG at 1/8 of its size, still reading all of it, in a third of the time.

    Raises:
        ImageError: not an image, a truncated one, or one with more than `MOST_PIXELS`, rejected before decoding.
    """
    sent = isinstance(source, bytes)
    name = "the image" if sent else str(source)
    try:
        with Image.open(io.BytesIO(source) if sent else source, formats=SENT_FORMATS if sent else None) as image:
            if image.format in DRAWINGS:
                raise ImageError(f"{name} is a vector drawing ({image.format}): save it as PNG or JPEG")
            _fit(image, name)
            if reduced:
                image.draft(None, (1, 1))
            image.load()
            return _as_rgb(_upright(image))
    except ImageError:
        raise
    except FileNotFoundError:
        raise ImageError(f"{name} does not exist") from None
    except Image.UnidentifiedImageError:
        hint = ": send PNG, JPEG, WebP, GIF or BMP" if sent else " that Pillow reads"
        raise ImageError(f"{name} is not an image in a supported format{hint}") from None
    except Exception as error:  # a damaged file can make Pillow's decoders raise nearly anything
        raise ImageError(f"{name} cannot be read as an image: {error}") from error


def _fit(image: Image.Image, name: str) -> None:
    """Limit the memory of an opened image, of which only the header has been read.

    Raises:
        ImageError: it has too many pixels.
    """
    width, height = image.size
    if width * height > MOST_PIXELS and not image.info.get("progressive"):  # progressive: decoded whole first
        shrink = next((s for s in (2, 4, 8) if math.ceil(width / s) * math.ceil(height / s) <= MOST_PIXELS), 8)
        image.draft(None, (width // shrink, height // shrink))  # formats other than JPEG stay as they are
    if image.width * image.height > MOST_PIXELS:
        raise ImageError(f"{name} has {width} x {height} pixels: at most {MOST_PIXELS // 10**6} million are accepted")


def _upright(image: Image.Image) -> Image.Image:
    try:
        ImageOps.exif_transpose(image, in_place=True)
    except Exception:  # ignore an unreadable EXIF block; the image itself is loaded
        return image
    return image


def _as_rgb(image: Image.Image) -> Image.Image:
    """An RGB copy, made with at most two copies in memory."""
    if image.has_transparency_data:
        return _over_white(image)
    if image.mode.startswith("I;16"):  # which Pillow would clip at 255
        levels = np.round(np.arange(2**16) / 257).astype(np.uint8)
        image = Image.fromarray(levels[np.asarray(image)])
    return image.convert("RGB")


def _over_white(image: Image.Image) -> Image.Image:
    """Composite a transparent image over white, band by band, because each step makes several copies."""
    result = Image.new("RGB", image.size)
    height = max(1, BAND // image.width)
    for top in range(0, image.height, height):
        band = image.crop((0, top, image.width, min(top + height, image.height))).convert("RGBA")
        white = Image.new("RGBA", band.size, "white")
        result.paste(Image.alpha_composite(white, band).convert("RGB"), (0, top))
    return result


def image_processor(vision_model: str | Path, image_size: int) -> CLIPImageProcessorPil:
    """The image processor of the tower in this folder: from its preprocessor_config.json, or CLIP's default."""
    folder = Path(vision_model)
    if any((folder / name).is_file() for name in ("preprocessor_config.json", "processor_config.json")):
        return CLIPImageProcessorPil.from_pretrained(str(folder), local_files_only=True)
    return default_processor(image_size)


def default_processor(image_size: int) -> CLIPImageProcessorPil:
    """CLIP's default: shortest side to `image_size` (bicubic), centre crop, CLIP's mean and std per channel."""
    square = {"height": image_size, "width": image_size}
    return CLIPImageProcessorPil(size={"shortest_edge": image_size}, crop_size=square)


def to_pixels(processor: CLIPImageProcessorPil, images: Sequence[Image.Image]) -> Tensor:
    """RGB images of any size -> (images, 3, H, W) fp32, preprocessed for the tower."""
    if not images:
        return to_pixels(processor, [Image.new("RGB", (3, 2))])[:0]
    cut = [_middle_of_strip(image) for image in images]
    return processor(images=cut, return_tensors="pt")["pixel_values"]


def _middle_of_strip(image: Image.Image) -> Image.Image:
    """Centre-crop a very elongated image, so that resizing its short side does not take gigabytes."""
    longest = STRIP_RATIO * min(image.size)
    if max(image.size) <= longest:
        return image
    width, height = (min(side, longest) for side in image.size)
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))


def image_token_id(tokenizer: PreTrainedTokenizerFast) -> int:
    """The id of the image token: `<image>`, or `@` in a tokenizer without it, such as MiniMind2's.

    Raises:
        ValueError: the tokenizer has neither.
    """
    entries = tokenizer.get_vocab()
    found = entries.get(IMAGE_MARKER, entries.get("@"))
    if found is None:
        raise ValueError(f"the tokenizer has neither {IMAGE_MARKER} nor @ to use as the image token")
    return found


class ImagePrompt(NamedTuple):
    """A prompt for the model: `model.stream(prompt.input_ids, **prompt.images)`, or `model(…)` likewise.

    input_ids: (1, n) int64.
    images: `image_mask` (1, n) bool and `pixel_values` (images, 3, H, W); empty for text alone.
    turns: the chat turns it contains, without the system turn.
    """

    input_ids: Tensor
    images: dict[str, Tensor]
    turns: list[dict]


def prepare_chat(
    tokenizer: PreTrainedTokenizerFast,
    chat: Sequence[dict],
    config: VLMConfig,
    processor: CLIPImageProcessorPil,
    room: int | None = None,
) -> ImagePrompt:
    """The prompt for the assistant's next turn, with images in the places where the chat has them.

    Only an attached image becomes one: `<image>` or `@` in a text stays text.

    Args:
        chat: turns {"role", "content"}, ending with the user's. Content is a string, or a list of strings and images
            in order, an image being bytes or a Path. A newline separates an image from its neighbours, as in the
            training data.
        room: maximum length in tokens (default: the model's context minus one); turns are dropped from the front,
            with their images, until it fits.

    Raises:
        ImageError: an image cannot be read.
        ValueError: the last turn alone does not fit; an unknown role.
    """
    turns = [turn | {"content": _with_places(turn["content"], config.image_tokens)} for turn in chat]
    has_system = bool(turns) and turns[0]["role"] == "system"
    room = config.max_seq_len - 1 if room is None else room
    ids, kept = fit_history(tokenizer, turns[:has_system], turns[has_system:], room)
    kept = [*chat[:has_system], *chat[len(chat) - len(kept) :]]
    parts = [part for turn in kept if not isinstance(turn["content"], str) for part in turn["content"]]
    images = [part for part in parts if not isinstance(part, str)]
    pixels = [to_pixels(processor, [read_image(image)]) for image in images]  # one image in memory at a time

    input_ids = torch.tensor([ids])
    mask = input_ids == IMAGE_PLACE
    input_ids[mask] = config.image_token_id
    inputs = {"image_mask": mask, "pixel_values": torch.cat(pixels)} if images else {}
    return ImagePrompt(input_ids, inputs, kept[has_system:])


@torch.inference_mode()
def prompt_embeddings(model: MiniMindVLM, prompt: ImagePrompt) -> Tensor | None:
    """The input embeddings that an engine prefills instead of the ids, (n, dim) fp32; None without images."""
    if not prompt.images:
        return None
    images = {name: tensor.to(model.device) for name, tensor in prompt.images.items()}
    return model.embed(prompt.input_ids.to(model.device), **images)[0].float()


def _with_places(content: str | list[str | bytes | Path], image_tokens: int) -> str | list[str | list[int]]:
    """Content for `render_chats`: each image becomes image tokens with a newline on either side."""
    if isinstance(content, str):
        return content
    pieces: list[str | list[int]] = []
    for part in content:
        piece = part if isinstance(part, str) else [IMAGE_PLACE] * image_tokens
        if pieces and not (isinstance(piece, str) and isinstance(pieces[-1], str)):
            pieces.append("\n")
        pieces.append(piece)
    return pieces
