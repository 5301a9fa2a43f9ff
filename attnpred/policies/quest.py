"""`quest`: the upper bound that a block's smallest and largest key channels allow (Quest, arXiv 2406.10774, eq. 1)."""

from dataclasses import dataclass
from typing import ClassVar, final

from torch import Tensor

from attnpred.config import CacheConfig
from attnpred.policies.base import Policy, View, widened
from attnpred.predictor.key_summary import KeySummary


@final
@dataclass(frozen=True, slots=True)
class Quest(Policy[KeySummary]):
    """Score a block by the bound of its logits for the current query."""

    kind: ClassVar[str] = "retrieval"
    cost: ClassVar[str] = "G N products of 2 D"
    source: ClassVar[str] = "arXiv 2406.10774"
    needs_query: ClassVar[bool] = True

    def memory(self, config: CacheConfig, layer: int) -> KeySummary:
        return KeySummary(config.block_size, bounds=True)

    def score(self, view: View[KeySummary]) -> Tensor:
        return widened(view.memory.estimate, view.zone)
