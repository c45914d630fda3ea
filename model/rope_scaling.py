"""Rotary positions for texts longer than a model's training rows: frequencies changed by a factor.

    linear   position interpolation: all frequencies divided by the factor (Chen et al. 2023, arXiv:2306.15595)
    ntk      a larger base: the lowest frequency divided by the factor, the highest as it was ("NTK-aware", bloc97 2023,
             https://www.reddit.com/r/LocalLLaMA/comments/14lz7j5)
    yarn     frequencies that turn often within the trained length stay, those that never turn once are divided by the
             factor, a ramp in between; and the logits are sharpened (Peng et al. 2023, arXiv:2309.00071)

A scaling is a dict with the names that transformers has: `rope_type`, `factor`, `original_max_position_embeddings` and,
for yarn, `beta_fast`, `beta_slow`, `attention_factor`. transformers has no name for ntk with a fixed factor, but it is
nothing else than another `rope_theta`, and is written as such into folders (its "dynamic" changes the base while a text
grows, when the cached keys already have the old one).
"""

import math

import torch
from torch import Tensor

TYPES = ("linear", "ntk", "yarn")
KEYS = ("rope_type", "factor", "original_max_position_embeddings")
YARN_KEYS = ("beta_fast", "beta_slow", "attention_factor")
MINIMIND3_YARN = {  # its switch `inference_rope_scaling`
    "rope_type": "yarn",
    "factor": 16.0,
    "original_max_position_embeddings": 2048,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "attention_factor": 1.0,
}


def checked_scaling(scaling: dict | None) -> dict | None:
    """A scaling with defaults for all missing values; None for None and for `rope_type` "default".

    Raises:
        ValueError: an unknown type or key, or a value out of range.
    """
    if scaling is None:
        return None
    scaling = dict(scaling)
    kind = scaling.pop("rope_type", scaling.pop("type", None))
    scaling.pop("type", None)
    if kind == "default":
        return None
    if kind not in TYPES:
        why = ": its base changes as the text grows, and cached keys would not match" if kind == "dynamic" else ""
        raise ValueError(f"rope_scaling of type {kind!r}{why}: use {', '.join(TYPES)}")
    scaling.pop("rope_theta", None)  # a field of its own here
    keys = KEYS[1:] + (YARN_KEYS if kind == "yarn" else ())
    if unknown := scaling.keys() - set(keys):
        raise ValueError(f"rope_scaling has {', '.join(sorted(unknown))}: {kind} takes {', '.join(keys)}")
    factor, original = scaling.get("factor"), scaling.get("original_max_position_embeddings")
    if not isinstance(factor, int | float) or not 1 <= factor < math.inf:
        raise ValueError(f"rope_scaling: factor must be a number of 1 or more, not {factor!r}")
    if not (isinstance(original, int) and original > 0) and (kind == "yarn" or original is not None):
        raise ValueError(f"rope_scaling: original_max_position_embeddings must be the trained length, not {original!r}")
    whole = {"rope_type": kind, "factor": float(factor)}
    if original is not None:
        whole["original_max_position_embeddings"] = original
    if kind == "yarn":
        default = {"beta_fast": 32.0, "beta_slow": 1.0, "attention_factor": 0.1 * math.log(factor) + 1}
        given = {name: scaling[name] for name in YARN_KEYS if scaling.get(name) is not None}
        if wrong := [name for name, value in given.items() if not isinstance(value, int | float) or not value > 0]:
            raise ValueError(f"rope_scaling: {wrong[0]} must be a number above 0, not {given[wrong[0]]!r}")
        whole |= {name: float(value) for name, value in (default | given).items()}
    return whole


def scale_frequencies(frequencies: Tensor, theta: float, scaling: dict) -> tuple[Tensor, float]:
    """The frequencies (head_dim / 2,) of a scaling from `checked_scaling`, and the factor of cosine and sine."""
    factor, kind = scaling["factor"], scaling["rope_type"]
    if kind == "linear":
        return frequencies / factor, 1.0
    head_dim = 2 * len(frequencies)
    if kind == "ntk":
        pair = torch.arange(0, head_dim, 2, device=frequencies.device, dtype=torch.float32)
        return ntk_theta(theta, factor, head_dim) ** (-pair / head_dim), 1.0
    ramp = _ramp(frequencies, theta, scaling)
    return frequencies * (1 - ramp + ramp / factor), scaling["attention_factor"]


def ntk_theta(theta: float, factor: float, head_dim: int) -> float:
    """The base with which the lowest frequency is divided by `factor`."""
    return theta * factor ** (head_dim / max(head_dim - 2, 1))


def _ramp(frequencies: Tensor, theta: float, scaling: dict) -> Tensor:
    """0 for frequencies to keep, 1 for those to divide by the factor, in between for the rest; (head_dim / 2,)."""
    head_dim, original = 2 * len(frequencies), scaling["original_max_position_embeddings"]

    def pair_that_turns(times: float) -> float:
        """The index of the pair, as a fraction, that turns this many times within the trained length."""
        return head_dim * math.log(original / (times * 2 * math.pi)) / (2 * math.log(theta))

    low = max(math.floor(pair_that_turns(scaling["beta_fast"])), 0)
    high = min(math.ceil(pair_that_turns(scaling["beta_slow"])), head_dim - 1)
    pair = torch.arange(len(frequencies), device=frequencies.device, dtype=torch.float32)
    return ((pair - low) / max(high - low, 0.001)).clamp(0, 1)
