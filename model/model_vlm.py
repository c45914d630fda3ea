"""MiniMind-V: a frozen CLIP encodes the images, and one linear layer projects its features into the prompt.

An image takes a run of `image_tokens` positions in the prompt, each with the id `image_token_id`. The vision tower
turns it into the same number of vectors, one per patch; projected to the model's width they replace the ids'
embeddings, and everything after that is the unchanged language model (as in LLaVA, Liu et al. 2023, arXiv:2304.08485).
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, CLIPVisionModel

from model.config import LMConfig
from model.model import MiniMindLM, MiniMindOutput

Images = Tensor | Sequence[Tensor | None]


class VLMConfig(LMConfig):
    """Configuration of the vision-language model: `LMConfig` and the layout of an image.

    Args:
        image_token_id: the id at an image's positions; 34 is `@` in the tokenizer published with MiniMind2.
        image_tokens: the number of positions per image; a model with a vision tower takes it from the tower.
        vision_dim: width of the tower's output; likewise.
    """

    model_type = "minimind-v"

    def __init__(self, image_token_id: int = 34, image_tokens: int = 196, vision_dim: int = 768, **kwargs):
        self.image_token_id = image_token_id
        self.image_tokens = image_tokens
        self.vision_dim = vision_dim
        super().__init__(**kwargs)


class VisionProj(nn.Module):
    """One linear layer from the tower's width to the language model's."""

    def __init__(self, vision_dim: int, dim: int):
        super().__init__()
        self.vision_proj = nn.Sequential(nn.Linear(vision_dim, dim))  # a Sequential: so are the published keys

    def forward(self, features: Tensor) -> Tensor:
        """features (..., vision_dim) -> (..., dim)."""
        return self.vision_proj(features)


class VisionTower(CLIPVisionModel):
    """The vision half of a CLIP."""

    base_model_prefix = "vision_model"  # as its keys begin in the file of a whole CLIP
    _keys_to_ignore_on_load_unexpected = [r"^text_", r"^visual_projection\.", r"^logit_scale$"]  # noqa: RUF012


def load_tower(folder: str | Path) -> VisionTower:
    """The vision half of a `transformers` CLIP folder, fp32, frozen, in eval mode.

    Raises:
        ValueError: the folder has no CLIP, or an incomplete one.
    """
    if not (Path(folder) / "config.json").is_file():
        raise ValueError(f"{folder} has no config.json: it is not a transformers folder")
    kind = VisionTower.config_class.get_config_dict(str(folder), local_files_only=True)[0].get("model_type")
    if kind not in ("clip", "clip_vision_model"):
        raise ValueError(f"{folder} holds a {kind!r} model, not a CLIP")
    tower, report = VisionTower.from_pretrained(
        str(folder), local_files_only=True, dtype=torch.float32, output_loading_info=True
    )
    if report["missing_keys"]:
        raise ValueError(f"{folder} lacks {sorted(report['missing_keys'])[:3]} of its CLIP's vision tower")
    return tower.requires_grad_(False).eval()


def tower_output(tower: VisionTower) -> tuple[int, int]:
    """The number of vectors that the tower gives for an image, and their width."""
    return (tower.config.image_size // tower.config.patch_size) ** 2, tower.config.hidden_size


class MiniMindVLM(MiniMindLM):
    """The language model with a vision tower.

    The tower is held beside the model's modules, not among them: `parameters()`, `state_dict()`, `train()`, DDP and
    DeepSpeed do not see it, so it is never trained, never saved and always in eval mode; `.to(…)` moves it.

    Args:
        vision_model: a `transformers` CLIP folder, or a tower from `load_tower`; `config.image_tokens` and
            `config.vision_dim` are set to match it. None: no tower; only text and `image_features` are accepted.

    Raises:
        ValueError: there is no CLIP in the folder.
    """

    config_class = VLMConfig
    _tower: tuple[VisionTower | None] = (None,)  # in a tuple, which hides it from nn.Module

    def __init__(self, config: VLMConfig | None = None, vision_model: str | Path | VisionTower | None = None):
        config = config or VLMConfig()
        tower = load_tower(vision_model) if isinstance(vision_model, str | Path) else vision_model
        if tower is not None:
            config.image_tokens, config.vision_dim = tower_output(tower)
        super().__init__(config)
        if tower is not None:
            self.set_tower(tower)
        self.vision_proj = VisionProj(config.vision_dim, config.dim)
        self.post_init()

    @property
    def vision_encoder(self) -> VisionTower | None:
        """The tower."""
        return self._tower[0]

    def set_tower(self, tower: VisionTower) -> None:
        """Use this tower from now on.

        Raises:
            ValueError: its output's width or number of tokens differs from the config's.
        """
        given, wanted = tower_output(tower), (self.config.image_tokens, self.config.vision_dim)
        if given != wanted:
            raise ValueError(f"the vision tower gives {given} (tokens, width), and the model takes {wanted}")
        self._tower = (tower.requires_grad_(False).eval().to(self.tok_embeddings.weight.device),)

    def _apply(self, fn, recurse: bool = True):
        if self.vision_encoder is not None:
            self.vision_encoder._apply(fn, recurse)
        return super()._apply(fn, recurse)

    @torch.no_grad()
    def encode_images(self, pixel_values: Tensor) -> Tensor:
        """The tower's features: its last hidden layer without the class token.

        Args:
            pixel_values: (images, 3, H, W), preprocessed for the tower.

        Returns:
            (images, image_tokens, vision_dim).

        Raises:
            ValueError: the model has no tower, or the images do not have its size.
        """
        if self.vision_encoder is None:
            raise ValueError("the model has no vision tower: give it one with vision_model= or set_tower")
        if len(pixel_values) == 0:
            return pixel_values.new_zeros(0, self.config.image_tokens, self.config.vision_dim)
        pixel_values = pixel_values.to(self.vision_encoder.dtype)
        return self.vision_encoder(pixel_values=pixel_values).last_hidden_state[:, 1:]

    def embed(
        self,
        input_ids: Tensor,
        pixel_values: Images | None = None,
        image_mask: Tensor | None = None,
        image_features: Images | None = None,
    ) -> Tensor:
        """The embeddings of a prompt, images included; see `forward`.

        Returns:
            (batch, n, dim).
        """
        x = self.tok_embeddings(input_ids)
        images, item_dims = (pixel_values, 3) if image_features is None else (image_features, 2)
        if images is None or (not isinstance(images, Tensor) and all(row is None for row in images)):
            return x
        tokens = self.config.image_tokens
        if image_mask is None:
            image_mask = find_image_places(input_ids, self.config.image_token_id, tokens, images, item_dims)
        places = image_mask.sum(1)
        if (places % tokens).any():
            raise ValueError(f"image places in a row: {places.tolist()}; an image takes {tokens}")
        images = flatten_images(images, (places // tokens).tolist(), item_dims)
        features = self.encode_images(images) if image_features is None else images
        if features.shape[1:] != (tokens, self.config.vision_dim):
            raise ValueError(
                f"image features of shape {tuple(features.shape)}: the model takes "
                f"(images, {tokens}, {self.config.vision_dim})"
            )
        # Also without any image: the projection then has a zero gradient rather than none, as DDP expects.
        projected = self.vision_proj(features.to(self.vision_proj.vision_proj[0].weight.dtype))
        return x.masked_scatter(image_mask[..., None], projected.to(x.dtype))

    def forward(
        self,
        input_ids: Tensor,
        *args,
        pixel_values: Images | None = None,
        image_mask: Tensor | None = None,
        image_features: Images | None = None,
        **kwargs,
    ) -> MiniMindOutput:
        """One pass, as in `MiniMindLM`, over a prompt with images at its image positions.

        With `past_key_values` the new tokens are text unless images are given with them.

        Args:
            pixel_values: the images, in any of three forms:
                - (batch, images, 3, H, W); a row with positions for fewer uses the first ones, the others are padding;
                - for each row a tensor (images, 3, H, W), or None if it has no images;
                - (images, 3, H, W), the images of all rows one after another.
            image_mask: (batch, n) bool, True at the images' positions: `image_tokens` per image, in order. Default:
                each run of `image_tokens` times `image_token_id`, from the left, takes the row's next image, and
                further runs are text. A prompt in which a user may have typed that token needs the mask, which
                `model.images.prepare_chat` returns.
            image_features: the output of `encode_images`, instead of `pixel_values`, in the same three forms with
                (image_tokens, vision_dim) instead of (3, H, W).

        Raises:
            ValueError: more or fewer images than positions for them.
        """
        embeds = self.embed(input_ids, pixel_values, image_mask, image_features)
        return super().forward(input_ids, *args, inputs_embeds=embeds, **kwargs)


def find_image_places(
    input_ids: Tensor, image_token_id: int, image_tokens: int, images: Images, item_dims: int
) -> Tensor:
    """The positions of each row's images, from the ids alone.

    From the left, each run of `image_tokens` times `image_token_id` is an image, until all of the row's images are
    placed; shorter runs and further ones are text.

    Args:
        input_ids: (batch, n) int64.
        images, item_dims: as in `flatten_images`.

    Returns:
        bool (batch, n).
    """
    if not isinstance(images, Tensor):
        at_most = [0 if row is None else len(row) for row in images]
    else:
        at_most = [images.size(1) if images.dim() == item_dims + 2 else len(images)] * len(input_ids)
    mask = torch.zeros_like(input_ids, dtype=torch.bool)
    for row, (ids, left) in enumerate(zip(input_ids.tolist(), at_most, strict=True)):
        run = 0
        for place, token in enumerate(ids):
            run = run + 1 if token == image_token_id else 0
            if run == image_tokens and left:
                mask[row, place + 1 - run : place + 1] = True
                run, left = 0, left - 1
    return mask


def flatten_images(images: Images, places_each: list[int], item_dims: int) -> Tensor:
    """The images of all rows one after another, (images, …); the three forms are those of `MiniMindVLM.forward`.

    Args:
        places_each: the number of images that each row has positions for.
        item_dims: dimensions of an image, 3 for pixels and 2 for features.

    Raises:
        ValueError: more images than places, or fewer.
    """
    if not isinstance(images, Tensor):
        given, wanted = [0 if row is None else len(row) for row in images], places_each
        flat = torch.cat([row for row in images if row is not None])
    elif images.dim() == item_dims + 1:
        given, wanted = len(images), sum(places_each)
        flat = images
    else:  # padded to the most images a row has
        given, wanted = images.size(1), max(places_each)
        flat = torch.cat([row[:count] for row, count in zip(images, places_each, strict=True)])
    if given != wanted:
        raise ValueError(f"images given: {given}, but the prompt has places for {wanted}")
    return flat


AutoConfig.register("minimind-v", VLMConfig)
AutoModelForCausalLM.register(VLMConfig, MiniMindVLM)
