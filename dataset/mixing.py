"""Several data files in one training run, each with a given share of the tokens."""

from collections.abc import Sequence

import numpy as np
import torch
from torch.utils.data import Dataset

from dataset.cache_folder import short_hash
from dataset.lm_dataset import RowDataset


def amounts(sizes: Sequence[float], shares: Sequence[float]) -> list[float]:
    """The amount to take from each file so that the shares hold and nothing is taken twice.

    As much as possible is taken: all of the file that would run out first, and the others in proportion.

    Args:
        sizes: the size of each file, in the unit of the shares (tokens, lines, characters).
        shares: above 0, relative to each other: 7 and 3 mean the same as 0.7 and 0.3.

    Returns:
        in the same unit, each at most the file's size.
    """
    whole = min(size / share for size, share in zip(sizes, shares, strict=True))
    return [min(size, whole * share) for size, share in zip(sizes, shares, strict=True)]


class MixedRows(Dataset):
    """Rows of several files in one dataset; each row is of one file, and the `StepLoader` shuffles them all together.

    Shares are of non-padding tokens, which determine the cost of training and in which mixtures are usually given: by
    lines, a file of long texts would outweigh one of short ones. The seed determines, once for all epochs, which rows
    of a file are taken; shares are exact to one row.

    Args:
        files: the rows of each file.
        shares: of each file, relative to each other; None takes all rows of all files.
        seed: determines which rows are taken.

    Attributes:
        packing, max_seq_len, empty_row: as for the files' rows.
        summary: the report at the start of a run: each file's own summary, and how much of it is taken.
    """

    def __init__(self, files: Sequence[RowDataset], shares: Sequence[float] | None, seed: int):
        self.files = files
        self.packing, self.max_seq_len = files[0].packing, files[0].max_seq_len
        self.shares = None if shares is None else [share / sum(shares) for share in shares]
        tokens = [file.row_tokens for file in files]
        if self.shares is None:
            self._rows = [np.arange(len(file)) for file in files]
        else:
            wanted = amounts([count.sum() for count in tokens], self.shares)
            self._rows = [
                _some_rows(count, amount, (seed, number))
                for number, (count, amount) in enumerate(zip(tokens, wanted, strict=True))
            ]
        self._ends = np.cumsum([len(rows) for rows in self._rows])
        taken = [int(count[rows].sum()) for count, rows in zip(tokens, self._rows, strict=True)]
        parts = [
            f"{amount / max(1, sum(taken)):.1%} {file.data_path} ({len(rows):,} of {len(file):,} rows, "
            f"{amount:,} tokens)"
            for amount, rows, file in zip(taken, self._rows, files, strict=True)
        ]
        self.summary = "\n".join([*(file.summary for file in files), f"mixed, by tokens: {', '.join(parts)}"])

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, row: int) -> dict[str, torch.Tensor]:
        if not 0 <= row < len(self):
            raise IndexError(f"row {row} of {len(self)}")
        number = int(np.searchsorted(self._ends, row, side="right"))
        return self.files[number][int(self._rows[number][row - self._ends[number]])]

    @property
    def empty_row(self) -> dict[str, torch.Tensor]:
        return self.files[0].empty_row

    @property
    def identity(self) -> dict:
        """The origin of the rows as JSON values: the hash of each file's bytes, and its share."""
        files = [file.identity for file in self.files]
        return {"sha256": short_hash([files, self.shares]), "files": files, "shares": self.shares}

    def changed_since(self, identity: dict) -> str | None:
        """A description of what has changed since `identity` was saved; None if nothing has."""
        if identity.get("sha256") == self.identity["sha256"]:
            return None
        before = identity.get("files", [])
        if len(before) != len(self.files):
            return f"the saved run used {len(before)} files, but --mix names {len(self.files)}"
        changes = (file.changed_since(then) for file, then in zip(self.files, before, strict=True))
        return next(filter(None, changes), "the shares of --mix differ from those of the saved run")


def _some_rows(tokens: np.ndarray, wanted: float, seed: tuple[int, int]) -> np.ndarray:
    """Rows drawn without replacement until they hold `wanted` tokens, in file order, int64 (taken,)."""
    drawn = np.random.default_rng(seed).permutation(len(tokens))
    taken = int(np.searchsorted(np.cumsum(tokens[drawn]), wanted)) + 1
    return np.sort(drawn[:taken])
