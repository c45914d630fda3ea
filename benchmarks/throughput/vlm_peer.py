"""Rows with images, and a peer that reads them, for the VLM stage; the images' content does not matter."""

import json
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor, nn
from transformers import CLIPImageProcessorPil, PreTrainedModel, PreTrainedTokenizerFast

from dataset.vlm_dataset import VLMDataset
from trainer.errors import UserError

IMAGE_TOKENS, VISION_DIM = 196, 768  # of the CLIP that MiniMind-V looks through
LINES = 2000


class SameFeatures:
    """Replaces a tower's cached features: the same random ones for every image."""

    def __init__(self):
        self.one = torch.randn(1, IMAGE_TOKENS, VISION_DIM, generator=torch.Generator().manual_seed(0))

    def of(self, names: list[str]) -> Tensor:
        """(pictures, IMAGE_TOKENS, VISION_DIM)."""
        return self.one.expand(len(names), -1, -1)


def chats_with_pictures(chats: Path, folder: Path) -> Path:
    """The first lines of a file of chats as a VLM's data, each with an image before its first question.

    Args:
        folder: the folder for the data and its image.

    Raises:
        UserError: the file has no `conversations`.
    """
    Image.new("RGB", (32, 32)).save(folder / "picture.png")
    lines = []
    with open(chats, encoding="utf-8") as file:
        for line, _ in zip(file, range(LINES), strict=False):
            turns = json.loads(line).get("conversations")
            if not turns:
                raise UserError(f"{chats} has no conversations: --stage vlm takes chats, such as sft_mini_512.jsonl")
            asked = next(turn for turn in turns if turn.get("role", "user") == "user")
            asked["content"] = f"<image>\n{asked['content']}"
            lines.append(json.dumps({"image": "picture.png", "conversations": turns}, ensure_ascii=False))
    path = folder / "chats.jsonl"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def picture_rows(path: Path, tokenizer: PreTrainedTokenizerFast, max_seq_len: int, packing: bool = True) -> VLMDataset:
    """The rows of `chats_with_pictures` with features instead of pixels, as with --cache_features."""
    processor = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    pictures = {"images_path": path.parent, "image_tokens": IMAGE_TOKENS, "processor": processor}
    rows = VLMDataset(path, tokenizer, max_seq_len, packing, **pictures)
    rows.features = SameFeatures()
    return rows


class PeerVLM(nn.Module):
    """transformers' language model after one linear layer, as in MiniMind-V."""

    def __init__(self, language_model: PreTrainedModel):
        super().__init__()
        self.language_model = language_model
        self.vision_proj = nn.Linear(VISION_DIM, language_model.config.hidden_size)

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor, image_mask: Tensor, image_features: Tensor
    ):
        """Rows (batch, n), with all images one after another -> transformers' output with the mean loss."""
        embeds = self.language_model.get_input_embeddings()(input_ids)
        projected = self.vision_proj(image_features).to(embeds.dtype)
        embeds = embeds.masked_scatter(image_mask[..., None], projected)
        return self.language_model(inputs_embeds=embeds, attention_mask=attention_mask, labels=labels)
