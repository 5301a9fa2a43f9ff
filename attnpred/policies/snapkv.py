"""`snapkv`: the prompt's last queries choose once which of it stays; all that is decoded stays (SnapKV, arXiv 2404.14469).

At the end of a prompt, the attention of the last `window` queries is summed for each position, smoothed over `kernel`
positions, so that what stands beside something important stays too, and the best fill the budget together with the window
itself (listing 1 of the paper). Nothing is evicted after that: the cache is the budget and all tokens since.

The published method works on tokens; here blocks are chosen, once per kv head, by rows of this library: the largest
probability in a block, over the heads that share keys. The smoothing reaches as many whole blocks as `kernel // 2` tokens
are, which is none with blocks of 16. With `block_size=1` and no groups it is the published method; both are worth
comparing (`snapkv:block_size=1`). Every later call of several tokens (a second turn, a chunk of a prompt, drafted tokens) is
the end of a prompt as well: it chooses among what is left, so that the budget holds again.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, final

import torch
from torch import Tensor

from attnpred.config import CacheConfig
from attnpred.errors import ConfigError
from attnpred.policies.base import Policy, View, newest_first, widened
from attnpred.predictor.memory import Columns, Memory


@final
class Window(Memory):
    """One row: the sum of the last `rows` rows of prompts. Where they come in pieces, older ones fade by their share."""

    def __init__(self, rows: int, block_size: int) -> None:
        self.rows, self.block_size = rows, block_size
        self.row = Columns()

    def tables(self) -> Sequence[Columns]:
        return (self.row,)

    @property
    def is_empty(self) -> bool:
        return not self.row.count

    def push(self, rows: Tensor, attended: Tensor | None = None) -> None:
        row = self.row.reserve(rows.shape[0], rows.shape[1], rows.shape[3], rows.device)
        row.mul_(max(0.0, 1 - rows.shape[2] / self.rows)).add_(rows.float().sum(2))

    def push_attended(self, selection: Tensor, maxima: Tensor, blocks: int) -> None:
        """Do nothing: what decoding attends to has no say."""


@final
@dataclass(frozen=True, slots=True)
class SnapKV(Policy[Window]):
    """Keep what the end of the prompt attends to, and everything decoded; drop the rest once.

    window: queries at the end of a prompt that choose, and stay; kernel: positions that are smoothed over, an odd number;
    pooling: "avg" or "max".
    """

    kind: ClassVar[str] = "eviction"
    cost: ClassVar[str] = "nothing after the prompt"
    source: ClassVar[str] = "arXiv 2404.14469"
    evicts: ClassVar[bool] = True
    keeps_decoded: ClassVar[bool] = True
    window: int = 64
    kernel: int = 5
    pooling: str = "avg"

    def __post_init__(self) -> None:
        for name, value in (("window", self.window), ("kernel", self.kernel)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ConfigError(f"got {name}={value!r}, expected a whole number of at least 1")
        if self.kernel % 2 == 0:
            raise ConfigError(f"got kernel={self.kernel}, expected an odd number, the same to both sides")
        if self.pooling not in ("avg", "max"):
            raise ConfigError(f"got pooling={self.pooling!r}, expected 'avg' or 'max'")

    def memory(self, config: CacheConfig, layer: int) -> Window:
        return Window(self.window, config.block_size)

    def score(self, view: View[Window]) -> Tensor:
        row, size = view.memory.row.view(), view.memory.block_size
        reach = self.kernel // 2 // size
        if reach:
            pool = torch.nn.functional.avg_pool1d if self.pooling == "avg" else torch.nn.functional.max_pool1d
            row = pool(row, 2 * reach + 1, stride=1, padding=reach)
        return widened(newest_first(row, -(-self.window // size)), view.zone)
