"""`accumulated`: the blocks with the most attention so far (the score of `h2o`, arXiv 2306.14048), nothing dropped.

Every block can come back, and the sum begins with the last rows of the prompt (`CacheConfig.history`). Beside `h2o` it tells
what eviction itself costs.
"""

from dataclasses import dataclass
from typing import ClassVar, final

from torch import Tensor

from attnpred.config import CacheConfig
from attnpred.policies.base import Policy, View, widened
from attnpred.predictor.average import Average


@final
@dataclass(frozen=True, slots=True)
class Accumulated(Policy[Average]):
    """Score a block by the sum of its rows."""

    kind: ClassVar[str] = "reuse"
    cost: ClassVar[str] = "N additions"
    source: ClassVar[str] = "arXiv 2306.14048, without eviction"

    def memory(self, config: CacheConfig, layer: int) -> Average:
        return Average(1.0, 1.0, config.history)

    def score(self, view: View[Average]) -> Tensor:
        return widened(view.memory.row.view(), view.zone)
