"""`ema`: an exponential moving average of past rows. The bar that a learned forecast has to clear.

The published CNN, once trained, behaves much like a recency-weighted average per block, so this comparison is mandatory.
"""

from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from attnpred.errors import ConfigError
from attnpred.policies.base import Policy, View
from attnpred.predictor.history import History


@final
@dataclass(frozen=True, slots=True)
class Ema(Policy):
    """Score a block by state <- (1 - rate) * state + rate * row; blocks outside the selection count as zero."""

    rate: float = 0.2

    def __post_init__(self) -> None:
        if not 0 < self.rate <= 1:
            raise ConfigError(f"got rate={self.rate!r}, expected above 0 and up to 1")

    def state_rows(self, history: int) -> int:
        return 1

    def push(self, history: History, rows: Tensor) -> None:
        for row in rows.unbind(2):
            history.blend(row, self.rate)

    def score(self, view: View) -> Tensor:
        row = view.history.last()
        return torch.nn.functional.pad(row, (0, view.zone.blocks - row.shape[-1]))
