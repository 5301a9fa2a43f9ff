"""`predicted`: forecast and correction from a few numbers per block (`attnpred.predictor.streaming`).

The forecast is made before the query is known, so all of it can be prefetched. The correction scores the blocks again with
the query of the step and the resident digests; `CacheConfig.late_share` says how much of it may be used.
"""

from dataclasses import dataclass
from typing import ClassVar, final

import torch
from torch import Tensor

from attnpred.config import CacheConfig
from attnpred.policies.base import Policy, View
from attnpred.predictor.predictor_config import PredictorConfig
from attnpred.predictor.pretrained import Predictor
from attnpred.predictor.streaming import Stream


@final
@dataclass(frozen=True, slots=True)
class Predicted(Policy[Stream]):
    """Score a block by its digest, its past attention and its distance, with trained weights."""

    kind: ClassVar[str] = "learned"
    cost: ClassVar[str] = "G N products of D in int8, 4 N multiply-adds"
    source: ClassVar[str] = "attnpred, after arXiv 2502.04077"
    predictor_kind: ClassVar[str] = "streaming"
    predictor: Predictor
    corrects: ClassVar[bool] = True

    @classmethod
    def untrained(cls, block_size: int, group: int, dim: int) -> "Predicted":
        return cls(Predictor(PredictorConfig(cls.predictor_kind, block_size)))

    def memory(self, config: CacheConfig, layer: int) -> Stream:
        place = self.predictor.place(layer)
        return Stream(config.block_size, self.predictor.streaming.digest_map(place), config.history)

    @torch.no_grad()
    def score(self, view: View[Stream]) -> Tensor:
        zone = view.zone
        return view.memory.score(self._weights(view), zone.sinks, zone.first_recent, zone.blocks)

    def choose(self, view: View[Stream]) -> Tensor:
        zone = view.zone
        return view.memory.choose(self._weights(view), zone.sinks, zone.first_recent, zone.blocks, zone.free)

    def _weights(self, view: View[Stream]) -> Tensor:
        """Return the weights of forecast or correction, [Hs or 1, FEATURES], on the memory's device, made once for it."""
        found = view.memory.weights.get(view.is_current)
        if found is None:
            place, peaks = self.predictor.place(view.layer), view.memory.peaks.data
            weights = self.predictor.streaming.weights(place, correcting=view.is_current).to(peaks.device)
            if weights.shape[0] not in (1, peaks.shape[1]):  # one selection per query head
                weights = weights.repeat_interleave(peaks.shape[1] // weights.shape[0], 0)
            found = view.memory.weights[view.is_current] = weights.contiguous()
        return found
