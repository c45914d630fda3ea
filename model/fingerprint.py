"""A fingerprint of weights, by which an adapter recognises its base and a cache its model."""

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor


def hash_weights(state: Mapping[str, Tensor]) -> str:
    """16 hex digits, equal for two state dicts with the same names and values (truncated SHA-256).

    Values are hashed as fp32, so a file and the model loaded from it agree. At most a second per 100 M parameters.
    """
    digest = hashlib.sha256()
    for name in sorted(state):
        digest.update(name.encode())
        digest.update(state[name].detach().to("cpu", torch.float32).contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()[:16]
