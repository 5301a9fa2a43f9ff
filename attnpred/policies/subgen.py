"""`subgen`: recent tokens, and older ones whose keys differ from each other (SubGen, arXiv 2402.06082).

Keys are clustered as they come: one within `delta` of a centre belongs to that cluster, another opens a new one. The paper
keeps a few tokens of each cluster, drawn at random, for an estimate of the softmax's denominator, and values drawn with a
probability like their squared length for its numerator. Both are sums in which each token counts for others, by a weight of
its own, and the attention here has no such weights: it is the exact softmax over what is kept. So this is the practical
form of the paper's experiments, without its error bound: recent tokens, and greedily chosen centres of the other keys. A
centre stands for its cluster by its own key and value; values have no say.

There is room for k centres, so the radius follows from the budget. A prompt is clustered at its end by the greedy k-centre
method: the oldest key first, then always the key that is farthest from all centres. What leaves the recent tokens later is
a centre, too, until there are k + 1 of them: then the newer one of the two nearest to each other is dropped, for good. With
`delta` above 0 a key within delta of a centre is dropped even where there is room, so heads differ in how much they keep.

The published method works on tokens, which is `block_size=1`; here the mean keys of blocks are clustered, for each kv head.
How the paper shares its budget between recent tokens and centres is not known to us; here it is half, as in H2O.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, final

import torch
from torch import Tensor

from attnpred.config import CacheConfig
from attnpred.errors import ConfigError
from attnpred.policies.base import Policy, View
from attnpred.predictor.memory import Columns, Memory


@final
class Centres(Memory):
    """Mean keys, points [B, Hkv, C, D], of blocks ids [B, Hkv, C] (ascending, -1 last) that are left, or new.

    Blocks before `settled` were compared with each other; there are `_sealed` full ones.
    """

    remembers: ClassVar[tuple[str, ...]] = ("points", "ids", "settled", "_sealed")

    def __init__(self, block_size: int, widest_recent: int) -> None:
        self.block_size, self.widest_recent = block_size, widest_recent
        self.clear()

    def tables(self) -> Sequence[Columns]:
        return ()

    def clear(self) -> None:
        self.points, self.ids = (
            torch.empty(0, dtype=torch.float32, device="cpu"),
            torch.empty(0, dtype=torch.int64, device="cpu"),
        )
        self.settled = self._sealed = 0

    @property
    def sealed(self) -> int:
        return self._sealed

    @property
    def is_empty(self) -> bool:
        return not self.ids.numel()

    def bytes(self) -> int:
        return sum(x.numel() * x.element_size() for x in (self.points, self.ids))

    def seal(self, keys: Tensor) -> None:
        new = keys.unflatten(2, (-1, self.block_size)).mean(3)
        ids = torch.arange(self._sealed, self._sealed + new.shape[2], device=keys.device).expand(new.shape[:3])
        self._sealed += new.shape[2]
        if self.is_empty:
            self.points, self.ids = new, ids
        else:
            self._keep(torch.cat((self.points, new), 2), torch.cat((self.ids, ids), 2))

    def _keep(self, points: Tensor, ids: Tensor) -> None:
        """Hold these, in order, in as few columns as the head with most of them needs."""
        order = ids.masked_fill(ids < 0, self._sealed).argsort(dim=2, stable=True)
        order = order[..., : int((ids >= 0).sum(2).max())]
        self.ids = ids.gather(2, order)
        self.points = points.gather(2, order[..., None].expand(-1, -1, -1, points.shape[3]))

    def thin(self, sinks: int | Tensor, last: int, room: int, delta: float) -> None:
        """Of the blocks from `sinks` (a number, or [B, 1, 1]) to `last` keep at most `room` of each head, centres of all."""
        middle = (self.ids >= sinks) & (self.ids < last)
        # A block at a time comes in the order of the text: the other way is for many.
        choose = _without_nearest if last - self.settled <= 1 else _farthest_first
        if last > self.settled:
            stays = ~middle | choose(self.points.float(), middle, room, delta)
            self._keep(self.points, self.ids.masked_fill(~stays, -1))
            self.settled = last

    def crop(self, columns: int) -> None:
        self._sealed = min(self._sealed, max(0, columns - 1))
        self.settled = min(self.settled, self._sealed)
        if self.ids.numel():
            self._keep(self.points, self.ids.masked_fill(self.ids >= self._sealed, -1))

    def select(self, rows: Tensor) -> None:
        self._map(lambda x: x[rows.to(x.device)])

    def repeat(self, times: int) -> None:
        self._map(lambda x: x.repeat_interleave(times, 0))


def _farthest_first(points: Tensor, middle: Tensor, room: int, delta: float) -> Tensor:
    """Return which of the points [B, H, C, D] that are `middle` [B, H, C] are the first `room` centres; see the module."""
    chosen = torch.zeros_like(middle)
    distances = torch.full(middle.shape, torch.inf, device=points.device, dtype=torch.float32).masked_fill(
        ~middle, -1.0
    )
    for _ in range(min(room, points.shape[2])):
        farthest = distances.argmax(2, keepdim=True)  # the first of equals: the oldest
        is_new = distances.gather(2, farthest) > delta
        chosen |= is_new & torch.zeros_like(middle).scatter(2, farthest, True)
        centre = points.gather(2, farthest[..., None].expand(-1, -1, -1, points.shape[3]))
        near = (points - centre).square().sum(-1).sqrt()
        distances = torch.minimum(distances, near.masked_fill(~middle, -1.0))
        distances = distances.scatter(2, farthest, -1.0)  # chosen, or everything is near enough
    return chosen


def _without_nearest(points: Tensor, middle: Tensor, room: int, delta: float) -> Tensor:
    """Return `middle` [B, H, C] without the newer one of the two nearest points, where it must go; see the module."""
    count = points.shape[2]
    if count < 2:
        return middle & (room > 0)
    later = torch.ones(count, count, dtype=torch.bool, device=points.device).triu(1)
    pairs = middle[..., :, None] & middle[..., None, :] & later
    # differences, not products: what is equal is at a distance of exactly 0
    apart = torch.cdist(points, points, compute_mode="donot_use_mm_for_euclid_dist").masked_fill(~pairs, torch.inf)
    nearest, place = apart.flatten(2).min(2, keepdim=True)
    goes = (middle.sum(2, keepdim=True) > room) | (nearest <= delta)
    return middle & ~torch.zeros_like(middle).scatter(2, place % count, goes)


@final
@dataclass(frozen=True, slots=True)
class SubGen(Policy[Centres]):
    """Keep the newest blocks, and those whose keys are far from each other's.

    delta: radius of a cluster, in units of the keys; 0: as small as the budget allows. recent_share: how much of the budget,
    sinks included, goes to the most recent tokens.
    """

    kind: ClassVar[str] = "eviction"
    cost: ClassVar[str] = "distances of all kept keys, when a block leaves the recent ones"
    source: ClassVar[str] = "arXiv 2402.06082"
    evicts: ClassVar[bool] = True
    leaves_out: ClassVar[bool] = True
    delta: float = 0.0
    recent_share: float = 0.5

    def __post_init__(self) -> None:
        delta, share = self.delta, self.recent_share
        if isinstance(delta, bool) or not isinstance(delta, int | float) or not 0 <= delta < float("inf"):
            raise ConfigError(f"got delta={delta!r}, expected a distance of at least 0")
        if isinstance(share, bool) or not isinstance(share, int | float) or not 0 <= share <= 1:
            raise ConfigError(f"got recent_share={share!r}, expected a share of the budget from 0 to 1")

    def memory(self, config: CacheConfig, layer: int) -> Centres:
        return Centres(config.block_size, config.recent_window // config.block_size + 1)

    def score(self, view: View[Centres]) -> Tensor:
        zone, memory = view.zone, view.memory
        blocks, ids = zone.blocks, memory.ids
        if zone.covers_all:
            return torch.zeros(1, 1, blocks, device=ids.device, dtype=torch.float32)
        budget = zone.sinks + zone.free + memory.widest_recent
        newest = min(zone.free, max(0, int(self.recent_share * budget) - memory.widest_recent))
        last = zone.first_recent - newest
        sinks = zone.sinks if view.first_block is None else zone.sinks + view.first_block[:, None, None]
        memory.thin(sinks, last, zone.free - newest, self.delta)
        ids = memory.ids
        scores = torch.full((*ids.shape[:2], blocks + 1), -torch.inf, device=ids.device, dtype=torch.float32)
        scores.scatter_(2, ids.masked_fill((ids < 0) | (ids >= blocks), blocks), 1.0)
        scores = scores[..., :blocks]
        scores[..., last:] = 2.0
        return scores
