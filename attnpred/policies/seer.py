"""`seer`: a trained gate says which blocks the current query wants (SeerAttention-R, arXiv 2506.08889).

The gate, and what it keeps of every block, are in `attnpred.predictor.seer_gate`; `attnpred train --predictor seer-gate`
makes one from captured traces. Of the paper's two ways to choose, by a number of blocks or by a threshold of the gate, this
is the first: the budget is the same for every policy. Blocks of the paper have 64 or 128 tokens; here it is the cache's.
"""

from dataclasses import dataclass
from typing import ClassVar, final

from torch import Tensor

from attnpred.config import CacheConfig
from attnpred.policies.base import Policy, View, widened
from attnpred.predictor.predictor_config import PredictorConfig
from attnpred.predictor.pretrained import Predictor
from attnpred.predictor.seer_gate import GateKeys


@final
@dataclass(frozen=True, slots=True)
class Seer(Policy[GateKeys]):
    """Score a block by a gate, trained on the true block maxima, of its pooled keys and the current queries."""

    kind: ClassVar[str] = "learned"
    cost: ClassVar[str] = "N products of r, of gate vectors"
    source: ClassVar[str] = "arXiv 2506.08889"
    needs_query: ClassVar[bool] = True
    predictor_kind: ClassVar[str] = "seer-gate"
    predictor: Predictor

    @classmethod
    def untrained(cls, block_size: int, group: int, dim: int) -> "Seer":
        sizes = PredictorConfig(cls.predictor_kind, block_size, group=group, head_dim=dim, rank=dim)
        return cls(Predictor(sizes))

    def memory(self, config: CacheConfig, layer: int) -> GateKeys:
        place = self.predictor.place(layer)
        return GateKeys(config.block_size, self.predictor.gate.gate_map(place))

    def score(self, view: View[GateKeys]) -> Tensor:
        return widened(view.memory.estimate, view.zone)
