"""`KeySummary`: what the neighbours keep of a block's keys, in full precision: the mean, or the bounds of every channel.

The bounds give Quest's score (arXiv 2406.10774): no key of the block can have a larger product with the query than
sum over channels of max(q * low, q * high).
"""

from collections.abc import Sequence
from typing import ClassVar, final

import torch
from torch import Tensor

from attnpred.kernels.digest import FLOOR
from attnpred.predictor.memory import Columns, Memory


def log_shares(logits: Tensor, selecting: int) -> Tensor:
    """Return [B, Hs, N]: the logarithm of the softmax over blocks of `logits` [B, Hq, N], summed over each head's queries.

    Each query head has a normaliser of its own, or a head with large logits would choose for its whole group.
    """
    return torch.softmax(logits, -1).unflatten(1, (selecting, -1)).sum(2).log_().clamp_(min=FLOOR)


@final
class KeySummary(Memory):
    """Mean key, or the smallest and largest value of each channel, of every sealed block; `estimate` as in `Digest`."""

    remembers: ClassVar[tuple[str, ...]] = ("_sealed", "estimate")

    def __init__(self, block_size: int, *, bounds: bool) -> None:
        self.block_size, self.bounds = block_size, bounds
        self.table = Columns()
        self.clear()

    def clear(self) -> None:
        self.table.clear()
        self._sealed = 0
        self.estimate = torch.empty(0)

    def tables(self) -> Sequence[Columns]:
        return (self.table,)

    @property
    def sealed(self) -> int:
        return self._sealed

    def look_bytes(self) -> int:
        return self.bytes()

    def seal(self, keys: Tensor) -> None:
        blocks = keys.unflatten(2, (-1, self.block_size))
        if self._sealed == 0:
            width = keys.shape[3] * (2 if self.bounds else 1)
            self.table = Columns(after=(width,), dtype=keys.dtype)
        new = torch.cat((blocks.amin(3), blocks.amax(3)), -1) if self.bounds else blocks.mean(3)
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
        table = self.table.view().float()
        grouped = query.float().unflatten(1, (table.shape[1], -1)) * scale
        if self.bounds:
            grouped = torch.cat((grouped.clamp_max(0), grouped.clamp_min(0)), -1)
        self.estimate = log_shares((grouped @ table.transpose(-1, -2)).flatten(1, 2), selecting)

    def select(self, rows: Tensor) -> None:
        super().select(rows)
        self.estimate = self.estimate[rows.to(self.estimate.device)] if self.estimate.numel() else self.estimate

    def repeat(self, times: int) -> None:
        super().repeat(times)
        self.estimate = self.estimate.repeat_interleave(times, 0) if self.estimate.numel() else self.estimate
