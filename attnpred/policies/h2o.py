"""`h2o`: heavy hitters and recent tokens; what is neither is dropped for good (H2O, arXiv 2306.14048, algorithm 1).

A block's worth is the attention it was given by every query so far, all of the prompt's included; half of the budget is for
the most recent tokens, half for those worth most, and a block that loses its place is evicted, with its score.

The published method works on tokens, and on each query head alone. Here blocks are evicted, one choice per kv head, by rows
of this library: the largest probability in a block, over the heads that share keys. With `block_size=1` and no groups it is
the published sum, token by token; both are worth comparing (`h2o:block_size=1`). Its defaults are a fifth of the prompt,
half of it recent; here the budget is the cache's, and so are its sink tokens (the paper has none).
"""

from dataclasses import dataclass
from typing import ClassVar, final

from torch import Tensor

from attnpred.config import CacheConfig
from attnpred.errors import ConfigError
from attnpred.policies.base import Policy, View, newest_first, widened
from attnpred.predictor.average import Average


@final
@dataclass(frozen=True, slots=True)
class H2O(Policy[Average]):
    """Keep the newest blocks and those with the most attention so far; drop all others.

    recent_share: how much of the budget, sinks included, goes to the most recent tokens.
    """

    kind: ClassVar[str] = "eviction"
    cost: ClassVar[str] = "N additions; every row of the prompt"
    source: ClassVar[str] = "arXiv 2306.14048"
    evicts: ClassVar[bool] = True
    recent_share: float = 0.5

    def __post_init__(self) -> None:
        if not 0 <= self.recent_share <= 1:
            raise ConfigError(f"got recent_share={self.recent_share!r}, expected a share of the budget from 0 to 1")

    def memory(self, config: CacheConfig, layer: int) -> Average:
        return Average(1.0, 1.0, 1, every=True)

    def score(self, view: View[Average]) -> Tensor:
        zone = view.zone
        budget = zone.sinks + zone.free + zone.blocks - zone.first_recent
        return newest_first(widened(view.memory.row.view(), zone), int(self.recent_share * budget))
