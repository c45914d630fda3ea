"""From image bytes and a chat to what the model reads: pixels for its tower, and a prompt with places for them."""

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

MOST_PIXELS = 2**26  # of an image: 67 million, more than cameras make; decoded it takes a quarter of a gigabyte
SENT_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")  # of bytes, which anybody may have sent
DRAWINGS = ("EPS", "WMF")  # which Pillow has other programs draw
BAND = 2**20  # pixels that are laid over white at a time
STRIP_RATIO = 8  # sides of a strip that is cut to its middle before it is enlarged: the centre crop keeps less of it


class ImageError(ValueError):
    """An image cannot be used; the message is one line that says which, and why."""


def read_image(source: bytes | Path, reduced: bool = False) -> Image.Image:
    """An image from its bytes or its file as a person sees it: RGB, turned as its EXIF says, clear parts white.

    Of an animation the first frame. A JPEG of too many pixels is read at a half, a quarter or an eighth of its size.
    Bytes are of one of `SENT_FORMATS`, a file of any that Pillow reads by itself.

    Args:
        reduced: a JPEG comes in an eighth of its size, all of it read, in a third of the time.

    Raises:
        ImageError: no image, or not a whole one, or one of more than `MOST_PIXELS`, which is said before it is decoded.
    """
    sent = isinstance(source, bytes)
    name = "the image" if sent else str(source)
    try:
        with Image.open(io.BytesIO(source) if sent else source, formats=SENT_FORMATS if sent else None) as image:
            if image.format in DRAWINGS:
                raise ImageError(f"{name} is a drawing ({image.format}): save it as PNG or JPEG")
            _fit(image, name)
            if reduced:
                image.draft(None, (1, 1))
            image.load()
            return _as_rgb(_upright(image))
    except ImageError:
        raise
    except FileNotFoundError:
        raise ImageError(f"{name} is not there") from None
    except Image.UnidentifiedImageError:
        read = "is taken here: send PNG, JPEG, WebP, GIF or BMP" if sent else "Pillow reads"
        raise ImageError(f"{name} is not an image of a format that {read}") from None
    except Exception as error:  # a damaged file can make Pillow's decoders raise nearly anything
        raise ImageError(f"{name} cannot be read as an image: {error}") from error


def _fit(image: Image.Image, name: str) -> None:
    """See that an opened image, of which only the header is read, takes no more memory than it may.

    Raises:
        ImageError: it would.
    """
    width, height = image.size
    if width * height > MOST_PIXELS and not image.info.get("progressive"):  # such a JPEG is decoded whole first
        shrink = next((s for s in (2, 4, 8) if math.ceil(width / s) * math.ceil(height / s) <= MOST_PIXELS), 8)
        image.draft(None, (width // shrink, height // shrink))  # formats other than JPEG stay as they are
    if image.width * image.height > MOST_PIXELS:
        raise ImageError(f"{name} has {width} x {height} pixels: at most {MOST_PIXELS // 10**6} million are read")


def _upright(image: Image.Image) -> Image.Image:
    try:
        ImageOps.exif_transpose(image, in_place=True)
    except Exception:  # an unreadable EXIF block, which says nothing; the image itself is loaded
        return image
    return image


def _as_rgb(image: Image.Image) -> Image.Image:
    """A copy; of the image as it was and of the copy there is never a third beside them."""
    if image.has_transparency_data:
        return _over_white(image)
    if image.mode.startswith("I;16"):  # which Pillow would cut off at 255
        levels = np.round(np.arange(2**16) / 257).astype(np.uint8)
        image = Image.fromarray(levels[np.asarray(image)])
    return image.convert("RGB")


def _over_white(image: Image.Image) -> Image.Image:
    """An image that is clear in places, on white; band by band, as each takes several copies."""
    result = Image.new("RGB", image.size)
    height = max(1, BAND // image.width)
    for top in range(0, image.height, height):
        band = image.crop((0, top, image.width, min(top + height, image.height))).convert("RGBA")
        white = Image.new("RGBA", band.size, "white")
        result.paste(Image.alpha_composite(white, band).convert("RGB"), (0, top))
    return result


def image_processor(vision_model: str | Path, image_size: int) -> CLIPImageProcessorPil:
    """What prepares images for the tower in this folder: as its preprocessor_config.json says, or CLIP's usual way."""
    folder = Path(vision_model)
    if any((folder / name).is_file() for name in ("preprocessor_config.json", "processor_config.json")):
        return CLIPImageProcessorPil.from_pretrained(str(folder), local_files_only=True)
    return default_processor(image_size)


def default_processor(image_size: int) -> CLIPImageProcessorPil:
    """CLIP's way: shortest side to `image_size` (bicubic), the middle square, CLIP's mean and deviation a channel."""
    square = {"height": image_size, "width": image_size}
    return CLIPImageProcessorPil(size={"shortest_edge": image_size}, crop_size=square)


def to_pixels(processor: CLIPImageProcessorPil, images: Sequence[Image.Image]) -> Tensor:
    """RGB images of any sizes -> (images, 3, H, W) fp32, as the tower wants them."""
    if not images:
        return to_pixels(processor, [Image.new("RGB", (3, 2))])[:0]
    cut = [_middle_of_strip(image) for image in images]
    return processor(images=cut, return_tensors="pt")["pixel_values"]


def _middle_of_strip(image: Image.Image) -> Image.Image:
    """A very long image cut to its middle, so that enlarging its short side does not take gigabytes."""
    longest = STRIP_RATIO * min(image.size)
    if max(image.size) <= longest:
        return image
    width, height = (min(side, longest) for side in image.size)
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))


def image_token_id(tokenizer: PreTrainedTokenizerFast) -> int:
    """The id that holds an image's places: the entry `<image>`, or `@` of a tokenizer that has none, as MiniMind2's.

    Raises:
        ValueError: the tokenizer has neither.
    """
    entries = tokenizer.get_vocab()
    found = entries.get(IMAGE_MARKER, entries.get("@"))
    if found is None:
        raise ValueError(f"the tokenizer has neither {IMAGE_MARKER} nor @ to hold an image's places")
    return found


class ImagePrompt(NamedTuple):
    """A prompt for the model: `model.stream(prompt.input_ids, **prompt.images)`, or `model(…)` likewise.

    input_ids: (1, n) int64.
    images: `image_mask` (1, n) bool and `pixel_values` (images, 3, H, W); empty for text alone.
    turns: the turns of the chat that are in it, without the system turn.
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
    """The prompt for the assistant's next turn, with the images where the chat has them.

    Only an attached image becomes one: `<image>` or `@` in a text stays text.

    Args:
        chat: turns {"role", "content"}, a user's last. Content is a string, or a list of strings and images in their
            order, an image being its bytes or the Path of its file. Between an image and what stands beside it comes a
            newline, as in the data that teaches images.
        room: tokens the prompt may take (default: all that the model takes but one); turns are dropped from the
            front, with their images, until it fits.

    Raises:
        ImageError: an image cannot be read.
        ValueError: the last turn does not fit by itself; an unknown role.
    """
    turns = [{"role": turn["role"], "content": _with_places(turn["content"], config.image_tokens)} for turn in chat]
    has_system = bool(turns) and turns[0]["role"] == "system"
    room = config.max_seq_len - 1 if room is None else room
    ids, kept = fit_history(tokenizer, turns[:has_system], turns[has_system:], room)
    kept = [*chat[:has_system], *chat[len(chat) - len(kept) :]]
    parts = [part for turn in kept if not isinstance(turn["content"], str) for part in turn["content"]]
    images = [part for part in parts if not isinstance(part, str)]
    pixels = [to_pixels(processor, [read_image(image)]) for image in images]  # one is in memory at a time

    input_ids = torch.tensor([ids])
    mask = input_ids == IMAGE_PLACE
    input_ids[mask] = config.image_token_id
    inputs = {"image_mask": mask, "pixel_values": torch.cat(pixels)} if images else {}
    return ImagePrompt(input_ids, inputs, kept[has_system:])


@torch.inference_mode()
def prompt_embeddings(model: MiniMindVLM, prompt: ImagePrompt) -> Tensor | None:
    """What an engine reads in place of the prompt's ids, (n, dim) fp32; None where there are no images in it."""
    if not prompt.images:
        return None
    images = {name: tensor.to(model.device) for name, tensor in prompt.images.items()}
    return model.embed(prompt.input_ids.to(model.device), **images)[0].float()


def _with_places(content: str | list[str | bytes | Path], image_tokens: int) -> str | list[str | list[int]]:
    """Content for `render_chats`, with places for images and a newline at either side of them."""
    if isinstance(content, str):
        return content
    pieces: list[str | list[int]] = []
    for part in content:
        piece = part if isinstance(part, str) else [IMAGE_PLACE] * image_tokens
        if pieces and not (isinstance(piece, str) and isinstance(pieces[-1], str)):
            pieces.append("\n")
        pieces.append(piece)
    return pieces
