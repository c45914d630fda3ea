"""Data for preference learning: pairs of a better and a worse answer to one prompt, in the same row."""

import numpy as np
import torch
from transformers import PreTrainedTokenizerFast

from dataset.lm_dataset import RowDataset
from dataset.packing import Pieces
from dataset.records import Pair, parse_pair
from dataset.token_cache import Sample
from model.chat import render_chat_arrays


class DPODataset(RowDataset):
    """`{"chosen": […], "rejected": […]}` lines: in each chat, assistant turns after the two diverge are the targets.

    A row holds whole pairs, as many as fit 2 * max_seq_len tokens; its samples are chosen, rejected, chosen, rejected …
    A chat longer than max_seq_len is truncated. A pair then without targets on a side, or equal on both, is
    dropped.

    Attributes:
        reference: another model's log p of each token of the cache, fp32 (tokens,); if it is set, items have a column
            `reference`, fp32 (n,).
    """

    kind = "pair"
    unit, group = "pairs", 2
    parse = staticmethod(parse_pair)
    reference: np.ndarray | None = None

    @staticmethod
    def encode(tokenizer: PreTrainedTokenizerFast, pairs: list[Pair]) -> list[Sample]:
        return render_chat_arrays(tokenizer, [chat for pair in pairs for chat in pair])

    def make_pieces(self, samples: np.ndarray) -> Pieces:
        lengths = np.minimum(self.cache.lengths[samples], self.max_seq_len // self.group)
        learns = (self.cache.first_target[samples] < lengths).reshape(-1, 2).all(1)
        for pair in np.flatnonzero(learns & (lengths[::2] == lengths[1::2])):
            chosen, rejected = (self.cache.ids(samples[2 * pair + side], 0, lengths[2 * pair]) for side in (0, 1))
            learns[pair] = not np.array_equal(chosen, rejected)
        kept = self._grouped(np.flatnonzero(learns))
        return Pieces(kept, np.zeros_like(kept), lengths[kept])

    def __getitem__(self, row: int) -> dict[str, torch.Tensor]:
        item = super().__getitem__(row)
        if self.reference is not None:
            item["reference"] = torch.from_numpy(self.reference[self.places(row)])
        return item

    @property
    def empty_row(self) -> dict[str, torch.Tensor]:
        row = super().empty_row
        return row if self.reference is None else row | {"reference": torch.zeros(0)}

    def places(self, row: int) -> np.ndarray:
        """The indices of the row's tokens among all tokens of the cache, int64 (n,)."""
        pieces = self._pieces_in(row)
        begins = self.cache.begins[self.pieces.sample[pieces]]
        return np.concatenate(
            [np.arange(begin, begin + n) for begin, n in zip(begins, self.pieces.length[pieces], strict=True)]
        )
