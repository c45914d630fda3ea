"""A vision-language model and images for the tests of the web pages."""

import io
from pathlib import Path

import torch
from PIL import Image

from model.images import image_token_id
from model.model_vlm import MiniMindVLM, VLMConfig


def picture(colour: str, size: tuple[int, int] = (48, 40)) -> bytes:
    """A PNG of a single colour."""
    out = io.BytesIO()
    Image.new("RGB", size, colour).save(out, "PNG")
    return out.getvalue()


def save_vlm(tokenizer, clip_dir: Path, path: Path) -> Path:
    """Save random weights in the published form: without the tower, and without a json."""
    torch.manual_seed(0)
    config = VLMConfig(dim=32, n_layers=2, vocab_size=len(tokenizer), image_token_id=image_token_id(tokenizer))
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(MiniMindVLM(config, str(clip_dir)).state_dict(), path)
    return path
