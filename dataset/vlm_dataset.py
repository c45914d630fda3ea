"""Data for a vision-language model: chats with images, as rows of tokens that include the images' tokens."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import CLIPImageProcessorPil, PreTrainedTokenizerFast

from dataset.cache_folder import short_hash
from dataset.feature_cache import FeatureCache
from dataset.jsonl import DataError, Ignored
from dataset.lm_dataset import SFTDataset
from dataset.packing import Pieces
from dataset.pictures import check_pictures, refuse_faulty, shown
from dataset.records import Turns, parse_image_chat
from dataset.token_cache import Sample
from model.chat import render_chat_arrays
from model.images import IMAGE_MARKER, IMAGE_PLACE, ImageError, image_token_id, read_image, to_pixels

LISTED = 20  # names kept of images that have a fault
Record = tuple[list[str], Turns]  # names of images, chat


class VLMDataset(SFTDataset):
    """`{"image": …, "conversations": […]}` lines: samples without, with one, and with many images.

    Each `<image>` marker in a chat takes the next image; further markers stay text. Assistant turns are the targets.
    An answer that does not fit a row is cut, but a sample that would lose part of an image is dropped and counted.

    An item is a row as in `SFTDataset`, with `image_mask` bool (n,), True at the images' tokens, and the row's
    images in order: `pixel_values` (images, 3, H, W) fp32 or, once `features` is set, `image_features`
    (images, image_tokens, vision_dim).

    Args:
        images_path: the folder that the images' names are relative to.
        image_tokens: tokens per image.
        processor: the image processor of the tower.
        The others are those of `SFTDataset`.

    Attributes:
        features: the tower's features of the images; None = rows contain pixels.

    Raises:
        DataError: as in `SFTDataset`; an image named in a line is missing, truncated, or has no marker.
    """

    def __init__(
        self,
        data_path: str | Path,
        tokenizer: PreTrainedTokenizerFast,
        max_seq_len: int = 640,
        packing: bool = True,
        skip_bad_lines: bool = False,
        seed: int = 42,
        part: str = "all",
        *,
        images_path: str | Path,
        image_tokens: int,
        processor: CLIPImageProcessorPil,
    ):
        self.images_path = Path(images_path)
        self.image_tokens = image_tokens
        self.processor = processor
        self.features: FeatureCache | None = None
        self._no_pixels = to_pixels(processor, [])  # which every row's begin with
        self._check_pictures = partial(check_pictures, data_path, self.images_path, _names_in)
        pictures = self._check_pictures()
        faults = {name: picture.fault for name, picture in pictures.items() if picture.fault}
        self._faulty = sorted(faults)
        self._whole = short_hash([[name, picture.sha256] for name, picture in pictures.items() if not picture.fault])
        self.kind = f"pictures-{short_hash([sorted(faults.items()), image_tokens])}"
        self.parse = partial(parse_image_record, images_path=self.images_path, faults=faults)
        self.encode = partial(encode_image_chats, image_tokens=image_tokens)
        super().__init__(data_path, tokenizer, max_seq_len, packing, skip_bad_lines, seed, part)

    @property
    def identity(self) -> dict:
        """As in `RowDataset`, with the images' content, and the names of the damaged ones."""
        faulty = {"left_out": short_hash(self._faulty), "first_left_out": self._faulty[:LISTED]}
        return super().identity | {"images": self._whole} | faulty

    def changed_since(self, identity: dict) -> str | None:
        change, ours = super().changed_since(identity), self.identity
        if change or all(identity.get(key, ours[key]) == ours[key] for key in ("images", "left_out")):
            return change
        then = identity["first_left_out"]
        for name in then:
            if name not in self._faulty:
                return (
                    f"the image {self.images_path / shown(name)} is valid now, but the saved run began without its "
                    "lines: move it away to continue without them"
                )
        for name in self._faulty[:LISTED]:
            if name not in then and len(then) < LISTED:
                return f"the image {self.images_path / shown(name)} was valid when the saved run began: repair it"
        return f"the images in {self.images_path} have changed since the saved run began"

    def make_pieces(self, samples: np.ndarray) -> Pieces:
        pieces = super().make_pieces(samples)
        starts = [self.cache.note(sample)["starts"] for sample in samples[pieces.sample]]
        images_end = np.array([start[-1] + self.image_tokens if start else 0 for start in starts], dtype=np.int64)
        whole = images_end <= pieces.length
        self.notes = [(int((~whole).sum()), f"dropped because an image does not fit in {self.max_seq_len} tokens")]
        return Pieces(*(field[whole] for field in pieces))

    def __getitem__(self, row: int) -> dict[str, Tensor]:
        item = super().__getitem__(row)
        mask, names, begin = torch.zeros(len(item["input_ids"]), dtype=torch.bool), [], 0
        for piece in self._pieces_in(row):
            note = self.cache.note(self.pieces.sample[piece])
            names += note["images"]
            for start in note["starts"]:
                mask[begin + start : begin + start + self.image_tokens] = True
            begin += self.pieces.length[piece]
        return item | {"image_mask": mask} | self._images(names)

    @property
    def empty_row(self) -> dict[str, Tensor]:
        return super().empty_row | {"image_mask": torch.zeros(0, dtype=torch.bool)} | self._images([])

    def image_hashes(self) -> dict[str, str]:
        """The SHA-256 of the bytes, hex, of each image in the rows, by its name."""
        notes = (self.cache.note(sample) for sample in self.pieces.sample)
        names = {name for note in notes for name in note["images"]}
        pictures = self._check_pictures() if names else {}
        return {name: pictures[name].sha256 for name in names}

    def load_pixels(self, name: str) -> Tensor:
        """An image of `images_path`, preprocessed for the tower, (1, 3, H, W).

        Raises:
            DataError: it cannot be read.
        """
        try:
            return to_pixels(self.processor, [read_image(self.images_path / name)])
        except ImageError as error:
            raise DataError(str(error)) from error

    def _images(self, names: Sequence[str]) -> dict[str, Tensor]:
        if self.features is not None:
            return {"image_features": self.features.of(names)}
        return {"pixel_values": torch.cat([self._no_pixels, *map(self.load_pixels, names)])}


def _names_in(record: dict, ignored: Ignored) -> Sequence[str]:
    return parse_image_chat(record, ignored)[0]


def parse_image_record(record: dict, ignored: Ignored, images_path: Path, faults: dict[str, str]) -> Record:
    """`parse_image_chat`, with a check that all images exist and are whole.

    Args:
        faults: the faults of images, by name.

    Raises:
        BadRecord: as in `parse_image_chat`, or an image has a fault.
    """
    names, chat = parse_image_chat(record, ignored)
    refuse_faulty(names, images_path, faults)
    return names, chat


def encode_image_chats(
    tokenizer: PreTrainedTokenizerFast, records: Sequence[Record], image_tokens: int
) -> list[Sample]:
    """Ids including image tokens, loss masks, and a note with the images' names and the starts of their tokens."""
    place = image_token_id(tokenizer)
    chats = [_placed(chat, len(names), image_tokens) for names, chat in records]
    samples = []
    for (names, _), (ids, targets) in zip(records, render_chat_arrays(tokenizer, chats), strict=True):
        shown = ids == IMAGE_PLACE
        note = {"images": names, "starts": np.flatnonzero(shown)[::image_tokens].tolist()}
        samples.append((np.where(shown, place, ids), targets & ~shown, note))
    return samples


def _placed(chat: Turns, images: int, image_tokens: int) -> Turns:
    """The chat with image tokens in place of its first `images` markers."""
    turns = []
    for turn in chat:
        before, *after = turn["content"].split(IMAGE_MARKER, images)
        images -= len(after)
        pieces = [before]
        for text in after:
            pieces += [[IMAGE_PLACE] * image_tokens, text]
        turns.append(turn | {"content": pieces})
    return turns
