"""`freekv`: the choice of the last query serves the next step, except where the query has turned (FreeKV, arXiv 2505.13109).

Speculative retrieval: blocks are chosen by the query of step t - 1, so they can be fetched while the rest of the token runs.
Fine-grained correction: a head whose query has turned away from that one, cos(q[t], q[t - 1]) < tau, chooses again with q[t]
before it attends. The likeness is a mean over the query heads that select together; each of these groups decides by itself.

Blocks are scored by the bounds of their keys, as Quest does and as published. Where the settings limit what may come late
(`CacheConfig.late_share`), a correction keeps to that.
"""

from dataclasses import dataclass
from typing import ClassVar, final

import torch
from torch import Tensor

from attnpred.config import CacheConfig
from attnpred.errors import ConfigError
from attnpred.policies.base import Policy, View, widened
from attnpred.predictor.turning import Turning


@final
@dataclass(frozen=True, slots=True)
class FreeKV(Policy[Turning]):
    """Score a block by the bound of its logits for the last query, or for this one where the two differ."""

    kind: ClassVar[str] = "reuse"
    cost: ClassVar[str] = "G N products of 2 D, G of D"
    source: ClassVar[str] = "arXiv 2505.13109"
    corrects: ClassVar[bool] = True
    keeps: ClassVar[bool] = True
    tau: float = 0.8

    def __post_init__(self) -> None:
        if isinstance(self.tau, bool) or not isinstance(self.tau, int | float) or not -1 <= self.tau <= 1:
            raise ConfigError(f"got tau={self.tau!r}, expected a cosine, from -1 (never correct) to 1 (nearly always)")

    def memory(self, config: CacheConfig, layer: int) -> Turning:
        return Turning(config.block_size)

    def score(self, view: View[Turning]) -> Tensor:
        memory = view.memory
        now = widened(memory.bounds.estimate, view.zone)
        if not view.is_current or memory.before.numel() == 0:
            return now
        turned = (memory.likeness < self.tau)[..., None]
        return torch.where(turned, now, widened(memory.before, view.zone))
