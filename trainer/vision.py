"""Shared by the vision-language stages: the tower, the model around it, and cached features."""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

from torch import Tensor
from transformers import CLIPImageProcessorPil, PreTrainedTokenizerBase

from dataset import VLMDataset
from dataset.cache_folder import short_hash
from dataset.caches import limit_caches
from dataset.feature_cache import open_feature_cache
from model import LMConfig
from model.fingerprint import hash_weights
from model.images import image_processor, image_token_id, to_pixels
from model.model_vlm import MiniMindVLM, VisionTower, VLMConfig, load_tower, tower_output
from model.tokenizer import special_ids
from trainer.architecture import architecture, positions
from trainer.errors import UserError
from trainer.folder_layouts import read_json
from trainer.runtime import Runtime
from trainer.weights import load_weights, read_settings

# fields of a CLIPVisionConfig that affect the output but not the weights
TOWER_SETTINGS = ("hidden_act", "num_attention_heads", "layer_norm_eps", "image_size", "patch_size")


class Vision(NamedTuple):
    """A vision tower, its image processor, and the fingerprint of its weights."""

    tower: VisionTower
    processor: CLIPImageProcessorPil
    hash: str


def open_vision(folder: str) -> Vision:
    """The tower in a CLIP's folder.

    Raises:
        UserError: there is none, or it is damaged.
    """
    if not Path(folder).is_dir():
        raise UserError(
            f"--vision_model {folder} is missing: download openai/clip-vit-base-patch16 there, or name another CLIP "
            "(`make demo-vlm` makes a small one, out/demo/clip)"
        )
    try:
        tower = load_tower(folder)
        processor = image_processor(folder, tower.config.image_size)
    except Exception as error:  # a damaged folder makes transformers and safetensors raise almost anything
        raise UserError(f"--vision_model {folder} cannot be used: {error}") from error
    height, width = to_pixels(processor, []).shape[2:]
    side = tower.config.image_size
    if (height, width) != (side, side):
        raise UserError(
            f"--vision_model {folder}: its preprocessor_config.json gives {width} x {height} pixels, but its "
            f"tower takes {side} x {side}: use the tower's own file, or remove it for CLIP's default preprocessing"
        )
    return Vision(tower, processor, hash_weights(tower.state_dict()))


def load_vlm(
    path: Path,
    wanted: LMConfig | None,
    tokenizer: PreTrainedTokenizerBase,
    vision: Vision,
    missing: tuple[str, ...] = (),
) -> MiniMindVLM:
    """A vision-language model with the weights in a file or folder and this tower; see `load_weights`.

    Raises:
        UserError: as in `load_weights`; the weights were trained with another tower.
    """
    about = read_json(path / "config.json") if path.is_dir() else read_settings(path) or {}
    trained_with = about.get("vision_tower", vision.hash)
    if trained_with != vision.hash:
        raise UserError(f"{path} was trained with vision tower {trained_with}, but --vision_model is {vision.hash}")
    for name, given in zip(("image_tokens", "vision_dim"), tower_output(vision.tower), strict=True):
        if about.get(name, given) != given:
            raise UserError(f"{path} has {name} {about[name]}, but --vision_model gives {given}")
    try:
        place = about.get("image_token_id") or image_token_id(tokenizer)
    except ValueError as error:
        raise UserError(f"--tokenizer {tokenizer.name_or_path}: {error}") from None

    def build(config: LMConfig) -> MiniMindVLM:
        if config.generation != 2:
            raise UserError(f"{path}: a vision-language model must be of generation 2, not {config.generation}")
        if config.variant:
            raise UserError(f"{path} has {config.variant}, which a vision-language model cannot have")
        fields = architecture(config) | special_ids(tokenizer) | positions(config)
        del fields["generation"]  # which every VLMConfig has
        return MiniMindVLM(VLMConfig(image_token_id=place, **fields), vision.tower)

    return load_weights(path, wanted, tokenizer, missing, build)


def image_data(args, vision: Vision) -> Callable[..., VLMDataset]:
    """`VLMDataset` for `open_data`, with the settings of the vision flags."""
    image_tokens, _ = tower_output(vision.tower)
    return partial(VLMDataset, images_path=args.images_path, image_tokens=image_tokens, processor=vision.processor)


def cache_features(
    model: MiniMindVLM, datasets: Sequence[VLMDataset | None], args, vision: Vision, run: Runtime
) -> None:
    """Give the datasets the tower's output for each of their images, computed now unless it is cached.

    Raises:
        DataError: an image cannot be read; the disk is full.
    """
    datasets = [dataset for dataset in datasets if dataset is not None]
    images = {name: sha256 for dataset in datasets for name, sha256 in dataset.image_hashes().items()}
    if not images:
        return

    def encode(pixels: Tensor) -> Tensor:
        with run.autocast():
            return model.encode_images(pixels.to(run.device))

    computed_by = [getattr(vision.tower.config, name) for name in TOWER_SETTINGS]
    how = short_hash([vision.hash, computed_by, vision.processor.to_json_string(), run.dtype_name])
    with run.main_first():
        features = open_feature_cache(
            images, datasets[0].images_path, datasets[0].load_pixels, encode, how, num_workers=args.num_workers
        )
        limit_caches([args.data_path, args.images_path], args.cache_limit)
    run.print(f"features of {len(features):,} images: {features.folder}")
    for dataset in datasets:
        dataset.features = features
