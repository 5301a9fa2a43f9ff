"""`tidal`: two layers attend to everything and choose, the layers after each attend to its choice (TidalDecode, 2410.05076).

The layers below `sparse_layer_start` attend to everything. That layer does so too, and the blocks it gave most attention to
serve all layers above it, up to `correction_layer`, which does the same for the rest. A head's choice serves the same head
of the other layers; where layers differ in heads, the largest score over heads serves all. Published for Llama-3-8B of 32
layers: 2 and 13 (7 for Llama-2-7B, 14 or 31 for 70B). Only layers that are not dense by the settings, and have the whole
context, can choose: where the layer named is none of them, the next one does.

The paper ranks tokens (`block_size=1` here) by q.k. Attention itself, which is ranked here, is in the same order within a
query head, and fairer between the heads of a group. The paper's cache correction is off in its own tests, and left out.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, final

from torch import Tensor

from attnpred.config import CacheConfig
from attnpred.errors import ConfigError
from attnpred.policies.base import Policy, View, widened
from attnpred.predictor.shared_row import SharedRow


@final
@dataclass(frozen=True, slots=True)
class TidalDecode(Policy[SharedRow]):
    """Score a block by its largest probability in this step, in the last layer that attended to everything."""

    kind: ClassVar[str] = "reuse"
    cost: ClassVar[str] = "nothing; in a layer that chooses every key and value"
    source: ClassVar[str] = "arXiv 2410.05076"
    needs_query: ClassVar[bool] = True
    sparse_layer_start: int = 2
    correction_layer: int = 13

    def __post_init__(self) -> None:
        first, second = self.sparse_layer_start, self.correction_layer
        if any(isinstance(x, bool) or not isinstance(x, int) for x in (first, second)) or not 0 <= first <= second:
            raise ConfigError(
                f"got sparse_layer_start={first!r} and correction_layer={second!r}, expected layers, counted from 0, in order"
            )

    def leader(self, layer: int, layers: Sequence[int]) -> int:
        choosing = [
            min(candidates)
            for wanted in (self.sparse_layer_start, self.correction_layer)
            if (candidates := [one for one in layers if one >= wanted])
        ]
        return max((one for one in choosing if one <= layer), default=layer)

    def memory(self, config: CacheConfig, layer: int) -> SharedRow:
        return SharedRow()

    def score(self, view: View[SharedRow]) -> Tensor:
        memory = view.memory
        row = memory.row.view()
        if memory.leader is not None and row.shape[1] != memory.heads:
            row = row.amax(1, keepdim=True)
        return widened(row, view.zone)
