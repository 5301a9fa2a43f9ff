"""`full`: the whole cache, every step. The reference that every other policy is held against."""

from dataclasses import dataclass
from typing import ClassVar, final

from torch import Tensor

from attnpred.policies.base import Policy, View
from attnpred.predictor.memory import NoMemory


@final
@dataclass(frozen=True, slots=True)
class Full(Policy[NoMemory]):
    """Attend to everything."""

    is_dense: ClassVar[bool] = True

    def score(self, view: View[NoMemory]) -> Tensor:
        raise AssertionError("a dense policy is never asked to score")
