"""`full`: the whole cache, every step. The reference that every other policy is held against."""

from dataclasses import dataclass
from typing import ClassVar, final

from torch import Tensor

from attnpred.policies.base import Policy, View


@final
@dataclass(frozen=True, slots=True)
class Full(Policy):
    """Attend to everything."""

    is_dense: ClassVar[bool] = True

    def score(self, view: View) -> Tensor:
        raise AssertionError("a dense policy is never asked to score")
