"""`hip`: a tree search for the blocks that the current query wants, in O(log N) rounds (HiP, arXiv 2406.09827).

The context is cut into as many stretches as blocks may be chosen; round by round each is halved, a half is scored by the key
in its middle (the token that represents it), and the best halves go on (algorithm 1). What the paper calls k is what the
budget leaves beside sinks and recent window; its block_k (2 tokens) is `block_size`; its block_q is 1, for one query
decodes; its r_m, the steps between two searches, is `CacheConfig.selection_interval`. Where query heads select together
the largest logit counts.

The paper goes down to tokens; the leaves here are blocks, each represented by one key (`block_size=1`: tokens). Its second
cache, for the keys that represent, is this memory: they stay in fast memory, and blocks are fetched by the store.
"""

from dataclasses import dataclass
from typing import ClassVar, final

from torch import Tensor

from attnpred.config import CacheConfig
from attnpred.policies.base import Policy, View
from attnpred.predictor.centre_keys import UNSEEN, CentreKeys


@final
@dataclass(frozen=True, slots=True)
class HiP(Policy[CentreKeys]):
    """Score a block by the logit of its middle key, if a search of the tree of blocks comes to it."""

    kind: ClassVar[str] = "retrieval"
    cost: ClassVar[str] = "2 G K log2(N / K) products of D, of K blocks chosen"
    source: ClassVar[str] = "arXiv 2406.09827"
    needs_query: ClassVar[bool] = True

    def memory(self, config: CacheConfig, layer: int) -> CentreKeys:
        return CentreKeys(config.block_size)

    def score(self, view: View[CentreKeys]) -> Tensor:
        zone, memory = view.zone, view.memory
        batch, heads = memory.query.shape[:2]
        scores = memory.query.new_full((batch, heads, zone.blocks), UNSEEN)
        scores[..., zone.sinks : zone.first_recent] = memory.search(zone.sinks, zone.first_recent, zone.free)
        return scores
