"""Trains the projections of digests (`attnpred.predictor.digest`), one layer at a time, on captured queries and keys.

Start: the directions that matter most for logits if queries and keys were Gaussian, the eigenvectors of
C_q^(1/2) C_k C_q^(1/2). Then Adam on what a digest is for: the cross-entropy between the true attention over the blocks
and the digest's estimate of it, with codes rounded as in use (the gradient passes straight through the rounding). Queries
with much attention between sinks and recent window count for more.

How many vectors a block gets is decided by measurement: each of `choices` is trained for all heads, the mass that it loses
is measured on held-out documents, and the bytes are given, step by step, to the head where a byte recovers most.
"""

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from attnpred.kernels.digest import STEP
from attnpred.predictor.digest import DigestMap


def choices(block_size: int) -> list[int]:
    """Return how many vectors per block a head may get: few means, or one vector for each token."""
    return [count for count in (1, 2, 4) if block_size % count == 0 and count < block_size] + [block_size]


@dataclass(frozen=True, slots=True)
class LayerSample:
    """One document of one layer: float16 queries [Hkv, G, T, D], keys [Hkv, L, D]; positions of the queries [T]."""

    queries: Tensor
    keys: Tensor
    positions: Tensor


@dataclass(frozen=True, slots=True)
class Edges:
    """What is always attended: sinks and recent window, in blocks of `block_size` tokens; scale of the logits."""

    block_size: int
    sinks: int
    recent: int
    scale: float

    def scored(self, positions: Tensor, blocks: int) -> Tensor:
        """Return bool [M, N]: blocks that a query at each of `positions` has to choose from."""
        ids = torch.arange(blocks, device="cpu")
        first_recent = (positions + 1) // self.block_size - self.recent
        return (ids >= self.sinks) & (ids < first_recent[:, None])

    def sealed(self, positions: Tensor, blocks: int) -> Tensor:
        """Return bool [M, N]: blocks that were full before a query at each of `positions`."""
        return torch.arange(blocks, device="cpu") < ((positions[:, None] + 1) // self.block_size)


class Projection(torch.nn.Module):
    """Projections of one layer that can be trained, all heads with the same number of vectors per block."""

    def __init__(self, start: DigestMap, edges: Edges, vectors: int) -> None:
        super().__init__()
        self.keys, self.queries = torch.nn.Parameter(start.keys.clone()), torch.nn.Parameter(start.queries.clone())
        self.centre = torch.nn.Parameter(start.centre.clone())
        self.edges, self.vectors = edges, vectors

    def estimate(self, queries: Tensor, keys: Tensor, sealed: Tensor) -> Tensor:
        """Return [Hkv, M, N]: logarithm of the share of attention, for queries [Hkv, G, M, D] and whole blocks of keys."""
        spread = math.sqrt(self.edges.block_size / self.vectors)
        projected = (keys - self.centre[:, None]) @ self.keys
        vectors = projected.unflatten(1, (-1, self.edges.block_size // self.vectors)).mean(2) * spread
        rounded = ((vectors / STEP + 7.5).round().clamp(0, 15) - 7.5) * STEP
        edge = 7.5 * STEP
        vectors = vectors.clamp(-edge, edge)
        vectors = vectors + (rounded - vectors).detach()
        heads, group, count, _ = queries.shape
        logits = (queries.flatten(1, 2) @ self.queries) @ vectors.transpose(-1, -2) * (self.edges.scale / spread)
        logits = logits.unflatten(-1, (-1, self.vectors)).logsumexp(-1)
        logits = logits.view(heads, group, count, -1).masked_fill(~sealed, -1e4)
        return torch.log_softmax(logits, -1).logsumexp(1)

    def as_map(self) -> DigestMap:
        """Return the trained projections."""
        heads = self.keys.shape[0]
        return DigestMap(
            self.keys.detach().clone(),
            self.queries.detach().clone(),
            self.centre.detach().clone(),
            (self.vectors,) * heads,
        )


def starting_map(samples: Sequence[LayerSample], rank: int) -> DigestMap:
    """Return the best directions under the Gaussian assumption; projected keys have unit variance."""
    heads, dim = samples[0].keys.shape[0], samples[0].keys.shape[2]
    total = sum(sample.keys.shape[1] for sample in samples)
    centre = (
        sum(
            (sample.keys.float().sum(1) for sample in samples),
            torch.zeros(heads, dim, dtype=torch.float32, device="cpu"),
        )
        / total
    )
    query_moment, key_moment = (
        torch.zeros(heads, dim, dim, dtype=torch.float32, device="cpu"),
        torch.zeros(heads, dim, dim, dtype=torch.float32, device="cpu"),
    )
    for sample in samples:
        queries, keys = sample.queries.float().flatten(1, 2), sample.keys.float() - centre[:, None]
        query_moment += queries.transpose(1, 2) @ queries / queries.shape[1] / len(samples)
        key_moment += keys.transpose(1, 2) @ keys / total
    small = 0.02 * query_moment.diagonal(dim1=1, dim2=2).mean(1)
    values, vectors = torch.linalg.eigh(
        query_moment + small[:, None, None] * torch.eye(dim, dtype=torch.float32, device="cpu")
    )
    root = (vectors * values.sqrt()[:, None]) @ vectors.transpose(1, 2)
    inverse = (vectors * values.rsqrt()[:, None]) @ vectors.transpose(1, 2)
    strength, directions = torch.linalg.eigh(root @ key_moment @ root)
    spread = strength[:, -rank:].clamp_min(1e-9).sqrt()[:, None]
    directions = directions[:, :, -rank:]
    return DigestMap(root @ directions / spread, inverse @ directions * spread, centre, (1,) * heads)


def _draw(rng: random.Random, sample: LayerSample, edges: Edges, count: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return queries [Hkv, G, M, D], whole blocks of keys, attention per block [Hkv, M, N], positions [M]."""
    chosen = torch.tensor(
        rng.sample(range(len(sample.positions)), min(count, len(sample.positions))), dtype=torch.int64, device="cpu"
    )
    queries, positions = sample.queries[:, :, chosen].float(), sample.positions[chosen]
    blocks = sample.keys.shape[1] // edges.block_size
    keys = sample.keys[:, : blocks * edges.block_size].float()
    logits = (queries.flatten(1, 2) @ keys.transpose(-1, -2) * edges.scale).view(*queries.shape[:3], -1)
    logits = logits.masked_fill(torch.arange(keys.shape[1], device="cpu") > positions[:, None], -torch.inf)
    mass = torch.softmax(logits, -1).unflatten(-1, (-1, edges.block_size)).sum(-1).mean(1)
    return queries, keys, mass, positions


def train_projection(
    start: DigestMap,
    samples: Sequence[LayerSample],
    edges: Edges,
    vectors: int,
    steps: int,
    seed: str,
    lr: float = 2e-3,
    done: Callable[[], object] = lambda: None,
) -> Projection:
    """Return projections trained for `steps` steps of 24 queries each; `done` is told after each."""
    rng = random.Random(seed)
    projection = Projection(start, edges, vectors)
    optimizer = torch.optim.Adam(projection.parameters(), lr)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = lr * (1 - step / steps)
        with torch.no_grad():
            queries, keys, mass, positions = _draw(rng, rng.choice(samples), edges, 24)
        scored = edges.scored(positions, mass.shape[-1])
        estimate = projection.estimate(queries, keys, edges.sealed(positions, mass.shape[-1]))
        shares = torch.log_softmax(estimate.masked_fill(~scored, -1e4), -1)
        mass = mass * scored
        loss = -(mass * shares).sum(-1).mean() / mass.sum(-1).mean().clamp_min(1e-9)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        done()
    return projection


@torch.no_grad()
def lost_mass(projection: Projection, samples: Sequence[LayerSample], edges: Edges, share: float, seed: str) -> Tensor:
    """Return [Hkv]: attention that the best blocks hold and the chosen ones do not, choosing `share` of all blocks."""
    rng = random.Random(seed)
    lost = torch.zeros(projection.keys.shape[0], dtype=torch.float32, device="cpu")
    for sample in samples:
        queries, keys, mass, positions = _draw(rng, sample, edges, 64)
        blocks = mass.shape[-1]
        scored = edges.scored(positions, blocks)
        estimate = projection.estimate(queries, keys, edges.sealed(positions, blocks)).masked_fill(~scored, -1e9)
        count = max(1, int(share * blocks) - edges.sinks - edges.recent - 1)
        best = (mass * scored).topk(count, -1).values.sum(-1)
        got = (mass * scored).gather(-1, estimate.topk(count, -1).indices).sum(-1)
        lost += (best - got).mean(1) / len(samples)
    return lost


def give_vectors(lost: Tensor, counts: Sequence[int], total: float) -> list[int]:
    """Return vectors per block of each head, `total` of them at most; `lost` [len(counts), heads] by number of vectors."""
    heads = lost.shape[1]
    chosen = [0] * heads
    left = total - counts[0] * heads
    while True:
        upgrades = [
            (float(lost[chosen[head], head] - lost[choice, head]) / cost, head, choice, cost)
            for head in range(heads)
            for choice in range(chosen[head] + 1, len(counts))
            if (cost := counts[choice] - counts[chosen[head]]) <= left
        ]
        gain, head, choice, cost = max(upgrades, default=(0.0, 0, 0, 0))
        if gain <= 0:
            return [counts[choice] for choice in chosen]
        chosen[head] = choice
        left -= cost
