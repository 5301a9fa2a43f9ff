"""Which directions of a head's keys a digest keeps: those in which its queries tell keys apart, found at the prompt.

A digest of r numbers stands for a key of D, so the logit q . k is estimated from r products. With C = L L' the covariance of
the queries, q . k = (L^-1 q) . (L' k), and L^-1 q is the same in all directions; so the r numbers that lose least of the
logits, in the mean square over the queries, are the principal components of L' k (Eckart and Young, 1936). What is
coded are means of blocks, so it is their covariance that counts. Nothing is trained: one Cholesky factor and one
eigenvalue problem of D by D for each kv head. Of the queries their `Spread` is all that is needed, so new ones may be added.
"""

from typing import NamedTuple

import torch
from torch import Tensor

SHRINK = 1
"""Queries that a covariance of equal directions counts for, beside those that were seen."""


def rank_for(dim: int, block_size: int) -> int:
    """Return how many directions a block's digest keeps, r: even, D at most, and 3 D / 32 for each token of a block.

    In 4 bits that is 3 D / 64 bytes a token, 3 / 256 of keys and values in 16 bits, or less where D is the most.
    """
    most = dim + dim % 2  # codes come in pairs
    return max(2, min(most, most * block_size * 3 // 64 * 2))


class Spread(NamedTuple):
    """Of `queries` queries x of a group, the sum of x x': [B, H, D, D]."""

    sums: Tensor
    queries: int

    def and_new(self, queries: Tensor) -> "Spread":
        """Return it with queries [B, H, n, D], beside which the old ones count for no more than as many."""
        number, queries = queries.shape[2], queries.float()
        if not number and self.queries:
            return self
        new = Spread(queries.transpose(-1, -2) @ queries, number)
        if not self.queries:
            return new
        kept = min(1.0, number / self.queries)
        return Spread(new.sums + kept * self.sums, number + round(kept * self.queries))


def key_directions(spread: Spread, means: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return maps of keys and of queries, both [B, H, D, r], whose products of a key and a query estimate their logit.

    means [B, H, N, D] of blocks, centred. What a key is mapped to has a mean square of one in each direction.
    """
    dim, count = means.shape[-1], spread.queries
    sums, means = spread.sums.double(), means.double()
    eye = torch.eye(dim, dtype=torch.float64, device=means.device)
    level = sums.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None] / max(1, count)
    lower = torch.linalg.cholesky((sums + SHRINK * level * eye) / (count + SHRINK) + 1e-12 * eye)
    seen = means @ lower
    values, vectors = torch.linalg.eigh(seen.transpose(-1, -2) @ seen / max(1, means.shape[2]))
    kept = vectors[..., -rank:]
    size = values[..., None, -rank:].clamp_min(1e-12).sqrt()
    to_queries = torch.linalg.solve_triangular(lower.transpose(-1, -2), kept, upper=True) * size
    to_keys = lower @ kept / size
    missing = (0, rank - kept.shape[-1])  # an odd D
    return tuple(torch.nn.functional.pad(found.float(), missing).contiguous() for found in (to_keys, to_queries))  # type: ignore[return-value]
