"""`tactic`: as many blocks as a share of the attention needs, head by head (Tactic, arXiv 2502.12216).

Blocks are ranked for each query head by the product of its query with the centroid of their cluster. What they would get is
measured on a few of them and extended to the rest: along the ranks attention falls like y = a / x + b, fitted to two
samples, around a tenth and six tenths of the ranks; the first `HEAD` of them, at least a cluster, where the curve is
steepest, are computed exactly. Each query head takes the first so many that their estimated attention, sinks and recent
window included, reaches `mass` of all; a group of heads reads the union. So heads differ in how much they read, and none
reads more than the budget: where the union is larger, the blocks of the largest estimate stay. Fresh blocks, which are not
clustered yet, come before all others.

Published: mass 0.9 (or 0.75), clusters of 16 tokens on average, 10 rounds of k-means, clustering again after 2048 tokens;
exact for the first 1 to 2 %, about 2.5 % read for the estimate. The paper works on tokens (`block_size=1`): with blocks as
large as a cluster, a block is a cluster. Where the budget holds the whole context nothing is left out. Keys that are
measured are read from where they lie, and so fetched late where the cache is offloaded.
"""

import math
from dataclasses import dataclass
from typing import ClassVar, final

import torch
from torch import Tensor

from attnpred import checks
from attnpred.config import CacheConfig
from attnpred.errors import ConfigError
from attnpred.policies.base import Policy, View
from attnpred.predictor.clusters import Clusters

HEAD, NEAR, FAR, WIDTH = 0.02, 0.1, 0.6, 0.0025
"""Shares of the ranks: computed exactly; where the two samples begin; how wide each is."""

FIRST = 1e9
"""The score of blocks that come before all others."""


@final
@dataclass(frozen=True, slots=True)
class Tactic(Policy[Clusters]):
    """Score a block by its estimated share of the attention, up to a total of `mass`; leave out the rest."""

    kind: ClassVar[str] = "retrieval"
    cost: ClassVar[str] = "G products of D per cluster; 2.5 % of all keys, sinks and recent window; N log N"
    source: ClassVar[str] = "arXiv 2502.12216"
    needs_query: ClassVar[bool] = True
    leaves_out: ClassVar[bool] = True
    mass: float = 0.9
    cluster_size: int = 16
    rounds: int = 10
    again: int = 2048

    def __post_init__(self) -> None:
        mass = self.mass
        if isinstance(mass, bool) or not isinstance(mass, int | float) or not 0 < mass <= 1:
            raise ConfigError(f"got mass={mass!r}, expected a share of the attention above 0 and up to 1")
        for name, most in (("cluster_size", checks.WHOLE), ("rounds", 1000), ("again", checks.WHOLE)):
            checks.whole(name, getattr(self, name), 1, most)

    def memory(self, config: CacheConfig, layer: int) -> Clusters:
        return Clusters(config.block_size, self.cluster_size, self.rounds, self.again)

    def score(self, view: View[Clusters]) -> Tensor:
        zone, memory = view.zone, view.memory
        device, (batch, heads, _) = memory.query.device, memory.query.shape
        last = min(memory.count, zone.first_recent)  # blocks after it are fresh
        if zone.covers_all or last <= zone.sinks:
            return torch.zeros(1, 1, zone.blocks, device=device, dtype=torch.float32)
        assert view.block_logits is not None
        order = torch.sort(memory.wanted(zone.sinks, last), dim=-1, descending=True, stable=True).indices
        ranks = _sampled(last - zone.sinks, memory.per_cluster)
        always = torch.cat((torch.arange(zone.sinks, device="cpu"), torch.arange(last, zone.blocks, device="cpu"))).to(
            device
        )
        sampled = order[..., ranks.to(device)] + zone.sinks
        logits = view.block_logits(torch.cat((always.expand(batch, heads, -1), sampled), -1))
        found = torch.exp(logits - logits.amax(-1, keepdim=True))
        fixed, known = found[..., : always.numel()].sum(-1, keepdim=True), found[..., always.numel() :]
        shares = _curve(known, ranks, order.shape[2])
        total = fixed + shares.sum(-1, keepdim=True)
        before = fixed + shares.cumsum(-1) - shares  # what is attended without this one
        taken = torch.where(before < self.mass * total, shares / total, -torch.inf)
        scores = torch.full((batch, heads, zone.blocks), -torch.inf, device=device, dtype=torch.float32)
        scores[..., always] = FIRST
        scores.scatter_(2, order + zone.sinks, taken)
        return scores.unflatten(1, (memory.selecting, -1)).amax(2)


def _sampled(number: int, cluster: int) -> Tensor:
    """Return the ranks that are measured, of `number`: the first, at least as many as a cluster has, and two samples."""
    width = max(1, round(WIDTH * number))
    ranks = set(range(min(number, max(cluster, math.ceil(HEAD * number)))))
    for share in (NEAR, FAR):
        ranks |= set(range(int(share * number), min(number, int(share * number) + width)))
    return torch.tensor(sorted(ranks), dtype=torch.int64, device="cpu")


def _curve(known: Tensor, ranks: Tensor, number: int) -> Tensor:
    """Return the attention at each of `number` ranks, [B, Hq, number], from what is `known` at some, [B, Hq, S]."""
    far = ranks >= int(FAR * number)
    near = (ranks >= int(NEAR * number)) & ~far
    device = known.device
    x = torch.arange(1, number + 1, device=device, dtype=torch.float32)
    ends = [part if bool(part.any()) else ~far | far for part in (near, far)]
    (y1, y2), (x1, x2) = (
        [known[..., part.to(device)].mean(-1, keepdim=True) for part in ends],
        [float((1.0 / (ranks[part] + 1)).mean()) for part in ends],
    )
    slope = (y1 - y2) / (x1 - x2) if x1 > x2 else torch.zeros_like(y1)
    shares = (slope / x + (y2 - slope * x2)).clamp_min(0.0)
    shares[..., ranks.to(device)] = known
    return shares
