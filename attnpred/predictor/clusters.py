"""`Clusters`: blocks whose mean keys are alike, found by k-means, and the order in which a query wants them (Tactic).

What is clustered are mean keys of blocks, about `size` tokens to a cluster: with blocks of one token these are the tokens
themselves, as published; a block as large as a cluster is one by itself, and nothing is to be found out. A prompt is
clustered when it is sealed; what comes later is *fresh* until there are `again` tokens of it, which then are clustered
among themselves. The start is random, the same for every sequence and head, so that no row of a batch depends on another.
"""

from collections.abc import Mapping, Sequence
from typing import ClassVar, final

import torch
from torch import Tensor

from attnpred.predictor.key_summary import KeySummary
from attnpred.predictor.memory import Columns, Memory

CHUNK = 1 << 24
"""Distances that are held at once."""


def k_means(points: Tensor, count: int, rounds: int) -> tuple[Tensor, Tensor]:
    """Return centroids [R, count, D] and the cluster of each point, [R, N], of points [R, N, D]; `count` at most N."""
    rows, number, dim = points.shape
    start = torch.randperm(number, generator=torch.Generator().manual_seed(0), device="cpu")[:count].sort().values
    centroids = points[:, start.to(points.device)].clone()
    for _ in range(rounds):
        places = _nearest(points, centroids)
        ones = torch.ones(rows, number, device=points.device, dtype=torch.float32)
        sizes = torch.zeros(rows, count, device=points.device, dtype=torch.float32).scatter_add_(1, places, ones)
        sums = torch.zeros_like(centroids).scatter_add_(1, places[..., None].expand(-1, -1, dim), points)
        # A cluster that lost all its points stays where it was.
        centroids = torch.where(sizes[..., None] > 0, sums / sizes[..., None].clamp_min(1), centroids)
    return centroids, _nearest(points, centroids)


def _nearest(points: Tensor, centroids: Tensor) -> Tensor:
    offsets = centroids.square().sum(-1)[:, None] / 2
    step = max(1, CHUNK // (centroids.shape[0] * centroids.shape[1]))
    parts = [(piece @ centroids.transpose(1, 2) - offsets).argmax(-1) for piece in points.split(step, 1)]
    return torch.cat(parts, 1)


@final
class Clusters(Memory):
    """centroids [B, Hkv, C, D]; `count` blocks are clustered, the rest of the sealed ones is fresh."""

    remembers: ClassVar[tuple[str, ...]] = ("centroids", "count")

    def __init__(self, block_size: int, size: int, rounds: int, again: int) -> None:
        self.per_cluster, self.rounds, self.again = max(1, size // block_size), rounds, max(1, again // block_size)
        self.means = KeySummary(block_size, bounds=False)
        self.places = Columns(dtype=torch.int64)
        self.clear()

    def tables(self) -> Sequence[Columns]:
        return (self.places,)

    def parts(self) -> Mapping[str, Memory]:
        return {"means": self.means}

    def clear(self) -> None:
        super().clear()
        self.centroids, self.count = torch.empty(0, dtype=torch.float32, device="cpu"), 0
        self.query, self.selecting = torch.empty(0, dtype=torch.float32, device="cpu"), 0

    @property
    def sealed(self) -> int:
        return self.means.sealed

    @property
    def is_empty(self) -> bool:
        return self.means.sealed == 0

    def bytes(self) -> int:
        return super().bytes() + self.centroids.numel() * self.centroids.element_size()

    def look_bytes(self) -> int:
        table = self.means.table if self.per_cluster == 1 else None
        return self.centroids.numel() * self.centroids.element_size() if table is None else table.bytes()

    def seal(self, keys: Tensor) -> None:
        self.means.seal(keys)
        if self.count == 0 or self.sealed - self.count >= self.again:
            self._cluster()

    def _cluster(self) -> None:
        """Cluster what is fresh."""
        fresh = self.means.table.view()[:, :, self.count :].float()
        if self.per_cluster > 1:
            batch, heads, number, _ = fresh.shape
            found = -(-number // self.per_cluster)
            centroids, places = k_means(fresh.flatten(0, 1), found, self.rounds)
            old = self.centroids.shape[2] if self.count else 0
            self.places.reserve(batch, heads, self.sealed, fresh.device)[:, :, self.count :] = (
                places.unflatten(0, (batch, heads)) + old
            )
            centroids = centroids.unflatten(0, (batch, heads))
            self.centroids = torch.cat((self.centroids, centroids), 2) if self.count else centroids
        self.count = self.sealed

    def look(self, query: Tensor, scale: float, selecting: int) -> None:
        self.query, self.selecting = query.float() * scale, selecting
        if self.count == 0 and self.sealed:  # after a crop
            self._cluster()

    def wanted(self, first: int, last: int) -> Tensor:
        """Return [B, Hq, last - first]: the logit of the centroid of each clustered block from `first` to `last`."""
        whole = self.per_cluster == 1
        centroids = self.means.table.view().float()[:, :, first:last] if whole else self.centroids
        group = self.query.shape[1] // centroids.shape[1]
        logits = (self.query.unflatten(1, (-1, group)) @ centroids.transpose(-1, -2)).flatten(1, 2)
        if whole:
            return logits
        return logits.gather(2, self.places.view()[:, :, first:last].repeat_interleave(group, 1))

    def crop(self, columns: int) -> None:
        super().crop(columns)
        if self.sealed < self.count:  # centroids are means of what is gone, too
            self.places.clear()
            self.centroids, self.count = torch.empty(0, dtype=torch.float32, device="cpu"), 0

    def select(self, rows: Tensor) -> None:
        super().select(rows)
        self._map(lambda x: x[rows.to(x.device)])

    def repeat(self, times: int) -> None:
        super().repeat(times)
        self._map(lambda x: x.repeat_interleave(times, 0))
