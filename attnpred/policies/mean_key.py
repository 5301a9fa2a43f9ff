"""`mean_key` and `mean_key_last`: a block's mean key against the current query, or against the one before."""

from dataclasses import dataclass
from typing import ClassVar, final

from torch import Tensor

from attnpred.config import CacheConfig
from attnpred.policies.base import Policy, View, widened
from attnpred.predictor.key_summary import KeySummary


@final
@dataclass(frozen=True, slots=True)
class MeanKey(Policy[KeySummary]):
    """Score a block by the product of its mean key with the current query."""

    kind: ClassVar[str] = "retrieval"
    cost: ClassVar[str] = "G N products of D"
    needs_query: ClassVar[bool] = True

    def memory(self, config: CacheConfig, layer: int) -> KeySummary:
        return KeySummary(config.block_size, bounds=False)

    def score(self, view: View[KeySummary]) -> Tensor:
        return widened(view.memory.estimate, view.zone)


@final
@dataclass(frozen=True, slots=True)
class MeanKeyLast(Policy[KeySummary]):
    """Score a block by the product of its mean key with the last query, which can be prefetched."""

    kind: ClassVar[str] = "retrieval"
    cost: ClassVar[str] = "G N products of D"

    def memory(self, config: CacheConfig, layer: int) -> KeySummary:
        return KeySummary(config.block_size, bounds=False)

    def score(self, view: View[KeySummary]) -> Tensor:
        return widened(view.memory.estimate, view.zone)
