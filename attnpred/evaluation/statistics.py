"""Intervals by bootstrap: of a mean, and of the mean difference of two policies on the same items.

Percentile intervals (Efron, 1979), 95 %, from `RESAMPLES` samples with replacement; the same seed gives the same interval.
A policy is compared with the full cache in pairs, item by item by name: what is hard for both does not widen the interval.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

RESAMPLES = 2000


def bootstrap(values: Tensor, seed: int = 0) -> list[float]:
    """Return the 95 % interval of the mean of `values` [n], resampled with replacement."""
    generator = torch.Generator().manual_seed(seed)
    picks = torch.randint(len(values), (RESAMPLES, len(values)), generator=generator, device="cpu")
    means = values[picks].mean(1).sort().values
    return [float(means[int(0.025 * RESAMPLES)]), float(means[int(0.975 * RESAMPLES) - 1])]


def difference(ours: Mapping[str, float], theirs: Mapping[str, float], seed: int = 0) -> dict[str, float | list[float]]:
    """Return the mean of ours - theirs over the names that both have, its interval, and their number n (0: no interval)."""
    names = [name for name in ours if name in theirs]
    if not names:
        return {"n": 0}
    paired = torch.tensor([ours[name] - theirs[name] for name in names], dtype=torch.float64, device="cpu")
    return {"difference": float(paired.mean()), "interval": bootstrap(paired, seed), "n": len(names)}
