"""`BlockSummary`: one vector for every sealed block and kv head, kept in fast memory, and what the last query made of them.

What the vector is and how a query is scored with it is the business of who inherits: statistics of a block's keys
(`KeySummary`), or a trained projection of them (`GateKeys`). Vectors are numbers of the same kind as the keys.
"""

from abc import abstractmethod
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from attnpred.predictor.memory import Columns, Memory


class BlockSummary(Memory):
    """estimate [B, Hs, N]: for the query that was looked at last, the logarithm of a share for each sealed block."""

    remembers: ClassVar[tuple[str, ...]] = ("_sealed", "estimate")

    def __init__(self, block_size: int) -> None:
        self.block_size = block_size
        self.table = Columns()
        self.clear()

    @abstractmethod
    def summary(self, blocks: Tensor) -> Tensor:
        """Return the vectors [B, Hkv, N, W] of blocks of keys [B, Hkv, N, P, D]."""

    @abstractmethod
    def shares(self, query: Tensor, scale: float, selecting: int) -> Tensor:
        """Return `estimate` for `query` [B, Hq, D], of which there is at least one block; arguments as in `look`."""

    def clear(self) -> None:
        self.table.clear()
        self._sealed = 0
        self.estimate = torch.empty(0, dtype=torch.float32, device="cpu")

    def tables(self) -> Sequence[Columns]:
        return (self.table,)

    @property
    def sealed(self) -> int:
        return self._sealed

    def look_bytes(self) -> int:
        return self.bytes()

    def seal(self, keys: Tensor) -> None:
        new = self.summary(keys.unflatten(2, (-1, self.block_size)))
        if self._sealed == 0:
            self.table = Columns(after=(new.shape[3],), dtype=keys.dtype)
        stored = self.table.reserve(keys.shape[0], keys.shape[1], self._sealed + new.shape[2], keys.device)
        stored[:, :, self._sealed :] = new
        self._sealed += new.shape[2]

    def crop(self, columns: int) -> None:
        self._sealed = min(self._sealed, max(0, columns - 1))
        super().crop(self._sealed)

    def look(self, query: Tensor, scale: float, selecting: int) -> None:
        if self._sealed == 0:
            self.estimate = query.new_empty(query.shape[0], selecting, 0, dtype=torch.float32)
            return
        self.estimate = self.shares(query, scale, selecting)

    def select(self, rows: Tensor) -> None:
        super().select(rows)
        self.estimate = self.estimate[rows.to(self.estimate.device)] if self.estimate.numel() else self.estimate

    def repeat(self, times: int) -> None:
        super().repeat(times)
        self.estimate = self.estimate.repeat_interleave(times, 0) if self.estimate.numel() else self.estimate
