"""`predicted`: forecast and correction from a few numbers per block, fitted at the prompt (`attnpred.predictor.fitted`).

The forecast is made before the query is known, so all of it can be prefetched. The correction scores the blocks again with
the query of the step and the resident digests; `CacheConfig.late_share` says how much of it may be used.
"""

from dataclasses import dataclass
from typing import ClassVar, final

import torch
from torch import Tensor

from attnpred.config import CacheConfig
from attnpred.policies.base import Policy, View
from attnpred.predictor.fitted import Fitted


@final
@dataclass(frozen=True, slots=True)
class Predicted(Policy[Fitted]):
    """Score a block by its digest, its past attention and its distance, with weights that the prompt has taught."""

    kind: ClassVar[str] = "learned"
    cost: ClassVar[str] = "G N products of r in int8, 3 N multiply-adds"
    source: ClassVar[str] = "attnpred, after arXiv 2502.04077"
    corrects: ClassVar[bool] = True
    granularity: ClassVar[int] = 4
    estimates_rest: ClassVar[bool] = True

    def memory(self, config: CacheConfig, layer: int) -> Fitted:
        size = config.block_size
        edges = config.num_sink_tokens // size, config.recent_window // size
        return Fitted(size, edges, config.history)

    @torch.no_grad()
    def score(self, view: View[Fitted]) -> Tensor:
        zone, memory = view.zone, view.memory
        return memory.score(memory.weights(view.is_current), zone.sinks, zone.first_recent, zone.blocks)

    def choose(self, view: View[Fitted]) -> Tensor:
        zone = view.zone
        return view.memory.choose(view.is_current, zone.sinks, zone.first_recent, zone.blocks, zone.free)
