"""`Recycling`: the last row of attention to everything, and when the next one is due, for each batch row by itself.

That is after every `stride` steps or, if a similarity is given, in those of them whose query is less like that of the last
full step. Between full steps a block that came later has the largest attention that it was given; nothing else changes,
so what has dropped out of the best stays out.
"""

from collections.abc import Sequence
from typing import ClassVar, final

import torch
from torch import Tensor

from attnpred.predictor.memory import Columns, Memory
from attnpred.predictor.turning import likeness


@final
class Recycling(Memory):
    """One row per head. Since the last full step: steps [B], blocks that there were then [B], its query [B, Hq, D]."""

    remembers: ClassVar[tuple[str, ...]] = ("since", "known", "query", "is_due")

    def __init__(self, stride: int, similarity: float | None) -> None:
        self.rows = 1
        self.stride, self.similarity = stride, similarity
        self.row = Columns()
        self.clear()

    def tables(self) -> Sequence[Columns]:
        return (self.row,)

    @property
    def is_empty(self) -> bool:
        return self.row.count == 0

    def clear(self) -> None:
        super().clear()
        self.since = self.known = self.query = torch.empty(0, dtype=torch.float32, device="cpu")
        self.is_due = False

    def wants_all(self, query: Tensor) -> Tensor | None:
        if self.is_empty or self.is_due:
            return torch.ones(query.shape[0], dtype=torch.bool, device=query.device)
        self.since = self.since + 1
        full = self.since % self.stride == 0
        if self.similarity is not None and self.query.numel() and bool(full.any()):
            full &= likeness(query, self.query, 1)[:, 0] < self.similarity
        if not bool(full.any()):
            return None
        self.since = self.since.masked_fill(full, 0)
        self.query = torch.where(full[:, None, None], query, self.query) if self.query.numel() else self.query
        return full

    def push(self, rows: Tensor, attended: Tensor | None = None) -> None:
        batch, heads, _, blocks = rows.shape
        current = self.row.reserve(batch, heads, blocks, rows.device)
        new = rows[:, :, -1].to(current.dtype)
        if attended is None or bool(attended.all()):  # a full step of all batch rows, or the end of a prompt
            current.copy_(new)
            self.since = torch.zeros(batch, dtype=torch.int64, device=rows.device)
            self.known = torch.full_like(self.since, blocks)
            self.query, self.is_due = (
                torch.empty(0, dtype=torch.float32, device="cpu"),
                False,
            )  # the query is looked at next
            return
        full = attended.flatten(1).all(1)
        came_later = torch.arange(blocks, device=rows.device) >= self.known[:, None]
        grown = torch.where(came_later[:, None], torch.maximum(current, new), current)
        current.copy_(torch.where(full[:, None, None], new, grown))
        self.known = self.known.masked_fill(full, blocks)

    def look(self, query: Tensor, scale: float, selecting: int) -> None:
        if self.query.numel() == 0:
            self.query = query.clone()

    def crop(self, columns: int) -> None:
        super().crop(columns)
        self.is_due = True  # the full step may be among the tokens that are gone
        self.known = self.known.clamp_max(columns)

    def select(self, rows: Tensor) -> None:
        super().select(rows)
        self._map(lambda x: x[rows.to(x.device)])

    def repeat(self, times: int) -> None:
        super().repeat(times)
        self._map(lambda x: x.repeat_interleave(times, 0))
