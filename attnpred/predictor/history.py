"""`History`: the last R rows of one layer's attention, the only thing the published forecast looks at.

A row is the block maxima of one query's attention probabilities, [B, Hs, N]. Rows are kept in a ring, so a step writes
one row and moves nothing; `ordered` gives them oldest first, with rows of zeros in front while there are fewer than R.
Columns grow with the context.
"""

from collections.abc import Sequence
from typing import ClassVar, final

import torch
from torch import Tensor

from attnpred.predictor.memory import Columns, Memory


@final
class History(Memory):
    """A ring of `size` rows; all tensors fp32."""

    remembers: ClassVar[tuple[str, ...]] = ("count", "cursor")

    def __init__(self, size: int) -> None:
        self.size = self.rows = size
        self.ring = Columns(before=(size,))
        self.count = self.cursor = 0

    def tables(self) -> Sequence[Columns]:
        return (self.ring,)

    @property
    def is_empty(self) -> bool:
        return self.count == 0

    def clear(self) -> None:
        self.ring.clear()
        self.count = self.cursor = 0

    def push(self, rows: Tensor, attended: Tensor | None = None) -> None:
        """Append rows [B, Hs, R, N], oldest first; older rows read as zero in columns they never had."""
        rows = rows[:, :, -self.size :]
        batch, heads, added, columns = rows.shape
        ring = self.ring.reserve(batch, heads, columns, rows.device)
        places = (self.cursor + torch.arange(added, device=rows.device)) % self.size
        self.ring.data[:, :, places] = 0.0
        ring[:, :, places] = rows.to(ring.dtype)
        self.cursor = (self.cursor + added) % self.size
        self.count = min(self.size, self.count + added)

    def ordered(self) -> Tensor:
        """Return [B, Hs, R, N], oldest first."""
        return torch.roll(self.ring.view(), -self.cursor, 2)

    def last(self) -> Tensor:
        """Return the newest row, [B, Hs, N]."""
        return self.ring.view()[:, :, self.cursor - 1]
