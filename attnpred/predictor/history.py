"""`History`: the last R rows of one layer's attention, the only thing a forecast may look at.

A row is the block maxima of one query's attention probabilities, [B, Hs, N]. Rows are kept in a ring, so a step writes
one row and moves nothing; `ordered` gives them oldest first, with rows of zeros in front while there are fewer than R.
Columns grow with the context.
"""

from typing import final

import torch
from torch import Tensor


@final
class History:
    """A ring of `size` rows; all tensors fp32."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.clear()

    def clear(self) -> None:
        """Forget all rows."""
        self.count = 0
        self.cursor = 0
        self.columns = 0
        self.ring = torch.empty(0)

    def _reserve(self, rows: Tensor) -> None:
        batch, heads, _, columns = rows.shape
        if self.ring.numel() == 0:
            self.ring = torch.zeros(batch, heads, self.size, columns + 16, device=rows.device)
        elif columns > self.ring.shape[3]:
            self.ring = torch.nn.functional.pad(self.ring, (0, columns * 5 // 4 + 16 - self.ring.shape[3]))
        self.columns = max(self.columns, columns)

    def push(self, rows: Tensor) -> None:
        """Append rows [B, Hs, R, N], oldest first; older rows read as zero in columns they never had."""
        rows = rows[:, :, -self.size :]
        self._reserve(rows)
        added, columns = rows.shape[2], rows.shape[3]
        places = (self.cursor + torch.arange(added, device=rows.device)) % self.size
        self.ring[:, :, places] = 0.0
        self.ring[:, :, places, :columns] = rows.to(self.ring.dtype)
        self.cursor = (self.cursor + added) % self.size
        self.count = min(self.size, self.count + added)

    def blend(self, row: Tensor, rate: float) -> None:
        """Move the newest row towards `row` [B, Hs, N]: row <- (1 - rate) * row + rate * new. Needs `size` 1."""
        if self.count == 0:
            return self.push(row[:, :, None])
        self._reserve(row[:, :, None])
        current = self.ring[:, :, 0, : row.shape[2]]
        current.lerp_(row.to(current.dtype), rate)

    def ordered(self) -> Tensor:
        """Return [B, Hs, R, N], oldest first."""
        return torch.roll(self.ring[..., : self.columns], -self.cursor, 2)

    def last(self) -> Tensor:
        """Return the newest row, [B, Hs, N]."""
        return self.ring[:, :, self.cursor - 1, : self.columns]

    def crop(self, columns: int) -> None:
        """Forget what was seen of blocks from `columns` on (their tokens were removed)."""
        if columns < self.columns:
            self.ring[..., columns:] = 0.0
            self.columns = columns

    def select(self, rows: Tensor) -> None:
        """Make the batch `rows` of the old one."""
        if self.count:
            self.ring = self.ring[rows.to(self.ring.device)]

    def repeat(self, times: int) -> None:
        """Repeat each batch row `times` times."""
        if self.count:
            self.ring = self.ring.repeat_interleave(times, 0)
