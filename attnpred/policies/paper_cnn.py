"""The published forecast of AttentionPredictor (arXiv 2502.04077): a small CNN over the last H rows.

Sink and recent columns are cut off before the network sees the history, as published: they are kept anyway, and their
large values would drown the rest. The network is evaluated row by row (`attnpred.predictor.incremental`), which is exact.
It runs as policy `predicted` with `predictor="attention-predictor-cnn"`.
"""

from dataclasses import dataclass
from typing import ClassVar, final

import torch
from torch import Tensor

from attnpred.config import CacheConfig
from attnpred.policies.base import Policy, View, placed
from attnpred.predictor.incremental import IncrementalCNN
from attnpred.predictor.pretrained import Predictor


@final
@dataclass(frozen=True, slots=True)
class PaperForecast(Policy[IncrementalCNN]):
    """Score a block by the network's forecast of its next value."""

    kind: ClassVar[str] = "learned"
    cost: ClassVar[str] = "N values of a CNN of 3 layers"
    source: ClassVar[str] = "arXiv 2502.04077"
    predictor: Predictor
    calibration: ClassVar[int] = 5

    def memory(self, config: CacheConfig, layer: int) -> IncrementalCNN:
        return IncrementalCNN(self.predictor.cnn, config.history)

    @torch.no_grad()
    def score(self, view: View[IncrementalCNN]) -> Tensor:
        zone = view.zone
        return placed(view.memory.scores(zone.sinks, zone.first_recent), zone)
