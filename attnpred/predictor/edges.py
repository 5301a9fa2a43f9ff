"""`Edges`: which blocks of a captured document a query has to choose from, for whoever trains on captured attention."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Edges:
    """What is always attended: sinks and recent window, in blocks of `block_size` tokens; scale of the logits."""

    block_size: int
    sinks: int
    recent: int
    scale: float

    def scored(self, positions: Tensor, blocks: int) -> Tensor:
        """Return bool [M, N]: blocks that a query at each of `positions` has to choose from."""
        ids = torch.arange(blocks, device="cpu")
        first_recent = (positions + 1) // self.block_size - self.recent
        return (ids >= self.sinks) & (ids < first_recent[:, None])
