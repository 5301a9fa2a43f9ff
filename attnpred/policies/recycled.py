"""`recycled`: the attention of a full step is used again by the steps after it (Recycled Attention, arXiv 2411.05787).

Every `stride` steps a layer attends to everything; the blocks with the most attention then serve until the next such step,
beside the tokens that came later, of which the lowest drop out again. Published stride: 50 (10 and 256 elsewhere). All of it
is known ahead, so it can be prefetched; what it costs is that all keys and values are read every `stride` steps.

With `similarity` (the dynamic variant of RefreshKV, the later version of the paper; published with stride=5 and
similarity=0.8) a layer attends to everything in every `stride`th step if the cosine of its query and that of its last
full step, a mean over heads, has fallen below. The first full step is the prompt's last token.

The paper chooses tokens, by the attention of each kv head; that is `block_size=1` here.
"""

from dataclasses import dataclass
from typing import ClassVar, final

from torch import Tensor

from attnpred.config import CacheConfig
from attnpred.errors import ConfigError
from attnpred.policies.base import Policy, View, widened
from attnpred.predictor.recycled import Recycling


@final
@dataclass(frozen=True, slots=True)
class Recycled(Policy[Recycling]):
    """Score a block by its largest probability in the last step that attended to everything."""

    kind: ClassVar[str] = "reuse"
    cost: ClassVar[str] = "N comparisons; every key and value in each full step"
    source: ClassVar[str] = "arXiv 2411.05787"
    stride: int = 50
    similarity: float | None = None

    def __post_init__(self) -> None:
        stride, similarity = self.stride, self.similarity
        if isinstance(stride, bool) or not isinstance(stride, int) or stride < 1:
            raise ConfigError(f"got stride={stride!r}, expected a whole number of steps, at least 1")
        is_number = isinstance(similarity, int | float) and not isinstance(similarity, bool)
        if similarity is not None and not (is_number and -1 <= similarity <= 1):
            raise ConfigError(
                f"got similarity={similarity!r}, expected a cosine from -1 to 1, or None for a fixed stride"
            )

    def memory(self, config: CacheConfig, layer: int) -> Recycling:
        return Recycling(self.stride, self.similarity)

    def score(self, view: View[Recycling]) -> Tensor:
        return widened(view.memory.row.view(), view.zone)
