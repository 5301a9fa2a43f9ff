"""`streaming`: sinks and the most recent tokens, whatever they say (StreamingLLM, arXiv 2309.17453).

The rest is dropped for good. The published method counts positions inside the cache; here positions stay as they are.
"""

from dataclasses import dataclass
from typing import ClassVar, final

import torch
from torch import Tensor

from attnpred.policies.base import Policy, View
from attnpred.predictor.memory import NoMemory


@final
@dataclass(frozen=True, slots=True)
class Streaming(Policy[NoMemory]):
    """Keep sinks and the newest blocks up to the budget."""

    kind: ClassVar[str] = "eviction"
    evicts: ClassVar[bool] = True
    source: ClassVar[str] = "arXiv 2309.17453"

    def score(self, view: View[NoMemory]) -> Tensor:
        return torch.arange(view.zone.blocks, dtype=torch.float32, device="cpu").expand(1, 1, -1)
