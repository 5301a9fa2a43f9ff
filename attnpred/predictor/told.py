"""What true rows of attention tell: for every row and block the features that were known before it, and what came of it.

The rows are a prompt's last ones, or that of a dense step. Their queries' estimates are computed from the digests together,
each over the blocks that were sealed when the query came. A forecast had the estimate of the query before.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from attnpred.kernels.digest import FLOOR
from attnpred.predictor.digest import Digest

ELEMENTS = 1 << 21
"""Of features that are held at once."""


class Told(NamedTuple):
    """Of some rows: features [B, Hs, F, n], the logarithm of their attention and its root [B, Hs, n]; for which weights."""

    correcting: bool
    features: Tensor
    values: Tensor
    weights: Tensor


def mixing(count: int, seen: int, rate: float, device: torch.device) -> Tensor:
    """Return [count + 1, 1 + count]: what the average before and after each row is made of: what was there, and the rows.

    The first rows of all weigh more, so that the average of n rows is one of n rows.
    """
    mix = torch.zeros(count + 1, 1 + count, dtype=torch.float32, device="cpu")
    mix[0, 0] = 1.0
    for t in range(count):
        own = max(rate, 1 / (seen + t + 1))
        mix[t + 1] = mix[t] * (1 - own)
        mix[t + 1, 1 + t] += own
    return mix.to(device)


def told_by(
    rows: Tensor, averages: Tensor, query: Tensor, scale: float, digest: Digest, first: int, last: int, skipped: int
) -> Iterator[Told]:
    """Yield what rows [B, Hs, R, N] of queries [B, Hq, R, D], but for `skipped` ones, tell of blocks `first` to `last`.

    averages [B, Hs, R, last - first]: what was known of the past before each row; digest: with all keys sealed.
    """
    (batch, heads, count, _), sealed = rows.shape, digest.sealed
    several = max(1, ELEMENTS // (batch * query.shape[1] * sealed))
    places = torch.arange(sealed, device=rows.device, dtype=torch.int64)
    earlier = _earlier(digest, first, last) if skipped == 0 else None
    for begin in range(skipped, count, several):
        end, start = min(count, begin + several), max(0, begin - 1)
        later = count - 1 - torch.arange(start, end, device=rows.device, dtype=torch.int64)
        ends = sealed - later // digest.block_size  # blocks that were sealed when the query came
        logits = digest.logits(query[:, :, start:end], scale, sealed).masked_fill_(places >= ends[:, None], -torch.inf)
        shares = torch.softmax(logits, -1)[..., first:last].unflatten(1, (heads, -1)).sum(2)
        estimates = shares.log_().clamp_(min=FLOOR)
        if begin == 0 and earlier is not None:
            estimates = torch.cat((earlier[:, :, None], estimates), 2)
        true = rows[:, :, begin:end, first:last].float()
        values, weights = true.log().clamp_(min=FLOOR), true.sqrt()
        average = averages[:, :, begin:end].log().clamp_(min=FLOOR)
        distance = (ends[start - end :, None] - places[first:last])[begin - start :].float().log2_()
        for correcting, estimate in ((True, estimates[:, :, begin - end :]), (False, estimates[:, :, :-1])):
            size = estimate.shape[2]  # of the very first row no query was known before
            if size:
                parts = estimate, average[:, :, -size:], distance[-size:].expand_as(estimate), torch.ones_like(estimate)
                features = torch.stack([part.flatten(2) for part in parts], 2)
                yield Told(correcting, features, values[:, :, -size:].flatten(2), weights[:, :, -size:].flatten(2))


def _earlier(digest: Digest, first: int, last: int) -> Tensor | None:
    """Return what the digest said for the query before these [B, Hs, last - first], if there was one."""
    known = digest.estimate
    if known.ndim < 3 or known.shape[2] < last:
        return None
    return known[..., first:last]
