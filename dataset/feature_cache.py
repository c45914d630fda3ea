"""A frozen vision tower's features of a folder of images: computed once, then memory-mapped by every run and worker.

A cache is a folder with `features.bin`, fp16 (images, image_tokens, vision_dim), and `info.json`, the names in that
order and the shape of one. At ViT-B/16's 196 x 768 an image takes 301 kB.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from dataset.cache_folder import hold, open_cache, short_hash
from dataset.jsonl import unwrap_worker_errors
from dataset.workers import collate_to_send, require_room_for

FORMAT = 1  # to be raised when the files above change


class FeatureCache:
    """The features in a cache folder, by image name. It pickles as the folder's name: each worker maps the file itself.

    Raises:
        OSError, ValueError, LookupError: a file is missing, truncated or damaged.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        hold(folder, self)
        info = json.loads((folder / "info.json").read_text(encoding="utf-8"))
        self._place = {name: place for place, name in enumerate(info["names"])}
        self._features = np.memmap(folder / "features.bin", np.float16, "r").reshape(len(info["names"]), *info["shape"])

    def __reduce__(self):
        return FeatureCache, (self.folder,)

    def __len__(self) -> int:
        return len(self._place)

    def of(self, names: Sequence[str]) -> Tensor:
        """(len(names), image_tokens, vision_dim) fp16."""
        places = np.array([self._place[name] for name in names], dtype=np.int64)
        return torch.from_numpy(self._features[places])


def open_feature_cache(
    images: Mapping[str, str],
    images_path: Path,
    load: Callable[[str], Tensor],
    encode: Callable[[Tensor], Tensor],
    tower: str,
    batch_size: int = 64,
    num_workers: int = 0,
) -> FeatureCache:
    """Open the cache of these images, computing it if there is none.

    Args:
        images: the hash of each image's bytes by its name, at least one. The hashes are part of the cache's name: where
            the images lie, and when they were written, is not.
        images_path: the folder that the names are relative to, beside which the cache lies.
        load: name -> the image's pixels, (1, 3, H, W).
        encode: pixels (images, 3, H, W) -> features (images, image_tokens, vision_dim).
        tower: identifies the computation of `load` and `encode`.
        batch_size, num_workers: images encoded at once, and processes that load them.

    Raises:
        DataError: an image cannot be read; the cache cannot be written.
    """
    names = sorted(images)

    def build(folder: Path) -> None:
        require_room_for(num_workers)
        collate = partial(collate_to_send, collate=torch.cat)
        loader = DataLoader(_Loaded(names, load), batch_size, num_workers=num_workers, collate_fn=collate)
        with open(folder / "features.bin", "wb") as file:
            for pixels in unwrap_worker_errors(tqdm(loader, desc="encoding images", disable=None)):
                features = encode(pixels).to("cpu", torch.float16)
                features.numpy().tofile(file)
        # In ASCII with escapes, because a file's name need not be UTF-8
        (folder / "info.json").write_text(json.dumps({"names": names, "shape": features.shape[1:]}), encoding="ascii")

    # Which images are asked for is not a state of the folder: the next data file may ask for others.
    return open_cache(
        images_path,
        "features",
        f"{tower}-{short_hash([FORMAT, [[name, images[name]] for name in names]])}",
        FeatureCache,
        build,
    )


class _Loaded(Dataset):
    """The pixels of each image, loaded on access."""

    def __init__(self, names: Sequence[str], load: Callable[[str], Tensor]):
        self.names, self.load = names, load

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, place: int) -> Tensor:
        return self.load(self.names[place])
