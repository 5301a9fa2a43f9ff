"""`oracle`: the blocks with the largest true attention of this very step. Evaluation only: it reads every key."""

from dataclasses import dataclass
from typing import ClassVar, final

from torch import Tensor

from attnpred.policies.base import Policy, View
from attnpred.predictor.memory import NoMemory


@final
@dataclass(frozen=True, slots=True)
class Oracle(Policy[NoMemory]):
    """Score a block by the probability mass that the current query really puts on it."""

    cost: ClassVar[str] = "all keys: G N P products of D"
    needs_query: ClassVar[bool] = True

    def score(self, view: View[NoMemory]) -> Tensor:
        assert view.block_mass is not None
        return view.block_mass()
