"""Keys and values of the tokens processed so far, so that the next ones need not recompute them."""

import torch
from torch import Tensor


class _Buffer:
    """Storage for the keys and values of all layers; a cache already uses the first `used` positions."""

    def __init__(self, keys: list[Tensor], values: list[Tensor], capacity: int, used: int):
        self.keys = keys
        self.values = values
        self.capacity = capacity
        self.used = used


class KVCache:
    """The keys and values that `forward(use_cache=True)` returns as `past_key_values`.

    A cache is immutable once returned: two continuations of one prompt may both start from it. It works like Go's
    slices: a buffer grows by doubling, the first continuation appends in place (no copy per token), and a second one,
    finding that space taken, copies the prompt first.

    Attributes:
        length: positions held, padding included.
        segment_ids: (batch, length) int64, or None when each row is one sample without padding;
            0 = padding, equal numbers = the same sample.
        next_position: (batch,) int64, the position of each row's next token; None with `segment_ids` None.
    """

    def __init__(self, buffer: _Buffer, length: int, segment_ids: Tensor | None, next_position: Tensor | None):
        self._buffer = buffer
        self.length = length
        self.segment_ids = segment_ids
        self.next_position = next_position

    @staticmethod
    def extend(
        past: "KVCache | None", n_new: int, segment_ids: Tensor | None, next_position: Tensor | None
    ) -> "KVCache":
        """A cache with space for `n_new` positions after those of `past`; each layer fills them with `append`."""
        start = 0 if past is None else past.length
        buffer = _Buffer([], [], 0, 0) if past is None else past._buffer
        needed = start + n_new
        if buffer.used != start or needed > buffer.capacity:
            capacity = max(needed + 64, 2 * start)
            buffer = _Buffer(
                [_grown(k, start, capacity) for k in buffer.keys],
                [_grown(v, start, capacity) for v in buffer.values],
                capacity,
                start,
            )
        buffer.used = needed
        return KVCache(buffer, needed, segment_ids, next_position)

    def shortened(self, length: int) -> "KVCache":
        """The first `length` positions, of rows without padding; what follows takes the place of the others, which no
        cache may use any more."""
        self._buffer.used = length
        return KVCache(self._buffer, length, None, None)

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store the new keys and values (batch, n_kv_heads, n_new, head_dim); return those of all positions."""
        buffer = self._buffer
        if layer == len(buffer.keys):  # the very first tokens: now shape, dtype and device are known
            for store, new in ((buffer.keys, k), (buffer.values, v)):
                store.append(new.new_empty(new.size(0), new.size(1), buffer.capacity, new.size(3)))
        start = self.length - k.size(2)
        buffer.keys[layer][:, :, start : self.length] = k
        buffer.values[layer][:, :, start : self.length] = v
        return buffer.keys[layer][:, :, : self.length], buffer.values[layer][:, :, : self.length]


def _grown(old: Tensor, length: int, capacity: int) -> Tensor:
    """A copy of `old` (batch, heads, *, head_dim) with capacity for `capacity` positions."""
    new = old.new_empty(old.size(0), old.size(1), capacity, old.size(3))
    new[:, :, :length] = old[:, :, :length]
    return new


def build_attention_mask(segment_ids: Tensor, n_new: int) -> Tensor:
    """Which keys each new token attends to: earlier ones, of its own sample.

    Args:
        segment_ids: (batch, length) of all positions, the new ones last; 0 = padding. A padding token attends only to
            padding, at least itself, so that its softmax has something to sum over; no other token attends to it.
        n_new: how many of them are queries.

    Returns:
        bool (batch, 1, n_new, length), True = attend.
    """
    length = segment_ids.size(1)
    index = torch.arange(length, device=segment_ids.device)
    causal = index[None, :] <= index[length - n_new :, None]
    same = segment_ids[:, length - n_new :, None] == segment_ids[:, None, :]
    return (causal & same)[:, None]
