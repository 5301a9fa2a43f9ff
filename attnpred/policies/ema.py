"""`ema`: an exponential moving average of past rows. The bar that a learned forecast has to clear.

The published CNN, once trained, behaves much like a recency-weighted average per block, so this comparison is mandatory.
"""

from dataclasses import dataclass
from typing import ClassVar, final

from torch import Tensor

from attnpred.config import CacheConfig
from attnpred.errors import ConfigError
from attnpred.policies.base import Policy, View, widened
from attnpred.predictor.average import Average


@final
@dataclass(frozen=True, slots=True)
class Ema(Policy[Average]):
    """Score a block by state <- (1 - rate) * state + rate * row; blocks outside the selection count as zero."""

    kind: ClassVar[str] = "reuse"
    cost: ClassVar[str] = "N multiply-adds"
    source: ClassVar[str] = "attnpred, the bar for arXiv 2502.04077"
    rate: float = 0.2
    calibration: ClassVar[int] = 5

    def __post_init__(self) -> None:
        if not 0 < self.rate <= 1:
            raise ConfigError(f"got rate={self.rate!r}, expected above 0 and up to 1")

    def memory(self, config: CacheConfig, layer: int) -> Average:
        return Average(1 - self.rate, self.rate, config.history)

    def score(self, view: View[Average]) -> Tensor:
        return widened(view.memory.row.view(), view.zone)
