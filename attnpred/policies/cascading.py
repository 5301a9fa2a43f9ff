"""`cascading`: sub-caches of which each reaches twice as far as the one before (Cascading KV Cache, arXiv 2406.17808).

The budget behind the sinks is cut into `cascades` sub-caches of the same size. A new token goes to the first. What falls
out of the end of sub-cache j arrives at sub-cache j + 1, counting from 0, which accepts one token in 2 ** (j + 1) of the
text: every second arrival. One that is not accepted competes with the newest entry there by a moving average of its
attention, and the loser is dropped. So an entry of sub-cache j stands for 2 ** j successive tokens, and N sub-caches of c
entries reach c * (2 ** N - 1) tokens back, where a window of the same size reaches c * N.

That is how it is computed: which stretch of the text each entry stands for follows from its length alone, and of every
stretch the best of what is left stays. Nothing else has to be remembered but the average. What lost stays all the same as
long as the budget has room for it, the best first (the authors' code, too, fills the cache before it drops anything).

The published method works on tokens, and reads the prompt in strides with the cascade on. Here it works on blocks, one
choice per kv head, by rows of this library, and the prompt is dense: its tokens compete by their averages at its end, or
at the end of a chunk. The recent window is part of the first sub-cache, which is as large as that at least. Positions stay
those of the text; published are positions inside the cache. `block_size=1` is the published granularity. Published: 4
sub-caches, decay 0.9999.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, final

import torch
from torch import Tensor

from attnpred.config import CacheConfig
from attnpred.errors import ConfigError
from attnpred.policies.base import Policy, View, widened
from attnpred.predictor.memory import Columns, Memory


@final
class Fading(Memory):
    """One row: row <- decay * row + (1 - decay) * new, over every query so far; it begins with zeros."""

    rows, every = 1, True

    def __init__(self, decay: float, widest_recent: int) -> None:
        self.decay, self.widest_recent = decay, widest_recent
        self.row = Columns()

    def tables(self) -> Sequence[Columns]:
        return (self.row,)

    @property
    def is_empty(self) -> bool:
        return not self.row.count

    def push(self, rows: Tensor, attended: Tensor | None = None) -> None:
        count = rows.shape[2]
        row = self.row.reserve(rows.shape[0], rows.shape[1], rows.shape[3], rows.device)
        ages = torch.arange(count - 1, -1, -1, device=rows.device, dtype=torch.float32)
        gains = (1 - self.decay) * self.decay**ages
        row.mul_(self.decay**count).add_(torch.einsum("bhrn,r->bhn", rows.float(), gains))


@final
@dataclass(frozen=True, slots=True)
class Cascading(Policy[Fading]):
    """Keep the newest blocks, and of older ones the better of two, of four, of eight.

    cascades: how many sub-caches; decay: how much of the average stays at each token.
    """

    kind: ClassVar[str] = "eviction"
    cost: ClassVar[str] = "2 N additions; every row of the prompt"
    source: ClassVar[str] = "arXiv 2406.17808"
    evicts: ClassVar[bool] = True
    cascades: int = 4
    decay: float = 0.9999

    def __post_init__(self) -> None:
        count, decay = self.cascades, self.decay
        if isinstance(count, bool) or not isinstance(count, int) or not 1 <= count <= 32:
            raise ConfigError(f"got cascades={count!r}, expected a whole number from 1 to 32")
        if isinstance(decay, bool) or not isinstance(decay, int | float) or not 0 <= decay < 1:
            raise ConfigError(f"got decay={decay!r}, expected a share from 0 to below 1")

    def memory(self, config: CacheConfig, layer: int) -> Fading:
        return Fading(self.decay, config.recent_window // config.block_size + 1)

    def score(self, view: View[Fading]) -> Tensor:
        zone = view.zone
        row = widened(view.memory.row.view(), zone)
        if zone.covers_all:
            return row
        first, size = _sizes(zone.free, view.memory.widest_recent, self.cascades)
        places = torch.arange(zone.blocks, device=row.device)
        start = max(zone.sinks, zone.first_recent - (first - view.memory.widest_recent))
        stretches = _stretches(start - zone.sinks, size, self.cascades).to(row.device)
        older = row[..., zone.sinks : start]
        best = torch.full((*row.shape[:2], start - zone.sinks + 1), -1.0, device=row.device, dtype=torch.float32)
        index = stretches.expand_as(older)
        best.scatter_reduce_(2, index, older, "amax")
        is_best = older == best.gather(2, index)
        none = torch.full_like(best, zone.blocks, dtype=torch.int64)
        own = places[zone.sinks : start].expand_as(older)
        oldest = none.scatter_reduce_(2, index, own.masked_fill(~is_best, zone.blocks), "amin")  # of equals
        wins = (oldest.gather(2, index) == own) & (stretches < start - zone.sinks)
        return torch.cat((row[..., : zone.sinks], older + 2 * wins, row[..., start:] + 2), -1)


def _sizes(free: int, widest_recent: int, cascades: int) -> tuple[int, int]:
    """Return how many blocks the first sub-cache and each of the others has, with so many `free` ones behind the sinks."""
    whole = free + widest_recent
    size = whole // cascades
    if cascades > 1 and whole - (cascades - 1) * size < widest_recent:
        size = free // (cascades - 1)
    return whole - (cascades - 1) * size, size


def _stretches(count: int, size: int, cascades: int) -> Tensor:
    """Return for each of `count` blocks that fell out of the first sub-cache the number of its entry; `count` for none.

    Entry k of sub-cache j holds blocks k * 2 ** j and the following; numbers of entries are those of their first blocks.
    """
    found, fallen = torch.full((count,), count, dtype=torch.int64, device="cpu"), count
    for j in range(1, cascades):
        entries = math.ceil(fallen / 2)
        last, fallen = fallen << (j - 1), max(0, entries - size)
        last = min(last, count)
        blocks = torch.arange(min(fallen << j, last), last, device="cpu")  # none where a sub-cache has no room at all
        found[blocks] = blocks >> j << j
    return found
