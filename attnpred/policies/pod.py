"""`pod`: proximal tokens over distant ones (arXiv 2412.02252): nothing is left out, but layers share distant keys.

Which layers share is a setting of the cache (`CacheConfig.layer_groups`, with its windows and its gate), so that any other
policy can select in a cache that shares (`snapkv:layer_groups=F`): near tokens it attends to in any case, distant ones in
the blocks that each layer chooses. This one attends to everything. How it is computed: `attnpred.sharing`.
"""

from dataclasses import dataclass
from typing import ClassVar, final

from torch import Tensor

from attnpred.policies.base import Policy, View
from attnpred.predictor.memory import NoMemory


@final
@dataclass(frozen=True, slots=True)
class Pod(Policy[NoMemory]):
    """Attend to everything, with keys of a lower layer for distant tokens (needs the setting layer_groups)."""

    kind: ClassVar[str] = "reuse"
    source: ClassVar[str] = "arXiv 2412.02252"
    is_dense: ClassVar[bool] = True

    def score(self, view: View[NoMemory]) -> Tensor:
        raise AssertionError("a dense policy is never asked to score")
