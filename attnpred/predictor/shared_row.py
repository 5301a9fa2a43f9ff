"""`SharedRow`: the attention row of a layer that attends to everything, or, for a layer that follows one, that layer's.

For policies whose layers choose for each other (TidalDecode). A policy holds no state of a sequence and a layer's memory is
its own, so the cache, which has all layers, introduces the two (`Memory.follow`); the leader's decoder feeds its memory and
keeps it consistent with the cache, and the follower has nothing of its own to keep.
"""

from collections.abc import Sequence
from typing import final

import torch
from torch import Tensor

from attnpred.predictor.memory import Columns, Memory


@final
class SharedRow(Memory):
    """The last true row, [B, Hs, N], its own or that of `leader`; heads: how many select in its own layer."""

    def __init__(self) -> None:
        self.rows = 1
        self.own = Columns()
        self.leader: SharedRow | None = None
        self.heads = 0

    def follow(self, leader: Memory) -> None:
        assert isinstance(leader, SharedRow)
        self.leader, self.rows = leader, 0

    @property
    def row(self) -> Columns:
        """The row to choose by; the leader's is of the same step, because its layer comes first."""
        return self.own if self.leader is None else self.leader.row

    def tables(self) -> Sequence[Columns]:
        return (self.own,)

    @property
    def is_empty(self) -> bool:
        return self.row.count == 0

    def wants_all(self, query: Tensor) -> Tensor | None:
        if self.leader is not None:
            return None
        return torch.ones(query.shape[0], dtype=torch.bool, device=query.device)

    def look(self, query: Tensor, scale: float, selecting: int) -> None:
        self.heads = selecting

    def push(self, rows: Tensor, attended: Tensor | None = None) -> None:
        batch, heads, _, blocks = rows.shape
        self.own.reserve(batch, heads, blocks, rows.device).copy_(rows[:, :, -1])
