"""`last_step`: what mattered for the last token matters for the next. The forecast that costs nothing."""

from dataclasses import dataclass
from typing import ClassVar, final

from torch import Tensor

from attnpred.config import CacheConfig
from attnpred.policies.base import Policy, View, widened
from attnpred.predictor.average import Average


@final
@dataclass(frozen=True, slots=True)
class LastStep(Policy[Average]):
    """Score a block by its largest probability in the last row."""

    kind: ClassVar[str] = "reuse"
    cost: ClassVar[str] = "N copies"
    calibration: ClassVar[int] = 5

    def memory(self, config: CacheConfig, layer: int) -> Average:
        return Average(0.0, 1.0, 1)

    def score(self, view: View[Average]) -> Tensor:
        return widened(view.memory.row.view(), view.zone)
