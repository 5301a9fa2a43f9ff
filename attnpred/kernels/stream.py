"""What a streaming memory does with all blocks at every step: weigh, choose, and remember what was attended.

`attnpred.kernels.numba_stream` has the same functions in one pass each; they are bound by memory and by the number of calls.
"""

import math

import torch
from torch import Tensor

from attnpred.kernels.digest import DOUBT, FLOOR


def weigh(
    estimate: Tensor, past: Tensor, weights: Tensor, distance: Tensor, first: int, last: int, blocks: int
) -> Tensor:
    """Return [B, Hs, blocks]: forecasts of blocks `first` to `last` less the weight of one, others zero.

    A forecast is the sum, with weights [B, Hs, 4], of estimate [B, Hs, N], past [B, Hs, 1, capacity], distance
    [last - first], the same for all heads, and one; but at least the estimate less `DOUBT`.
    """
    score = torch.nn.functional.pad(estimate[..., first:last] * weights[..., :1], (first, blocks - last))
    inner = score[..., first:last]
    inner.addcmul_(past[:, :, 0, first:last], weights[..., 1:2])
    inner.addcmul_(distance, weights[..., 2:3])
    torch.maximum(inner, estimate[..., first:last] - (weights[..., 3:4] + DOUBT), out=inner)
    return score


def remember(
    past: Tensor, rate: float, blocks: int, estimate: Tensor, weights: Tensor, distance: Tensor, selection: Tensor,
    maxima: Tensor,
) -> None:  # fmt: skip
    """Bring one row into the logarithm of the average of the first `blocks` blocks, past [B, Hs, 1, capacity], in place.

    The row is maxima [B, Hs, K] for the blocks of `selection` [B, Hs, K], -1 for none. Of others it is their forecast
    (`weigh`), a logarithm, by estimate [B, Hs, N] and distance [N]; the floor after block N.
    """
    used, known = past[:, :, 0, :blocks], estimate.shape[2]
    # -1 only comes with left padding, where block 0 is padding too: what is written there is never looked at.
    row = torch.full_like(used, FLOOR)
    row[..., :known] = weigh(estimate, past, weights, distance, 0, known, known)
    row[..., :known] += weights[..., 3:]
    row.clamp_(FLOOR, 0.0).scatter_(2, selection.clamp_min(0), torch.log(maxima).clamp_(min=FLOOR))
    kept, gained = math.log(1 - rate), math.log(rate)
    used.copy_(torch.logaddexp(used + kept, row + gained).clamp_(min=FLOOR))


def choose(scores: Tensor, sinks: int, first_recent: int, blocks: int, free: int) -> Tensor:
    """Return ids [B, Hs, K] of the first `sinks` blocks, the `free` best of [sinks, first_recent), and the rest.

    scores [B, Hs, first_recent or more]; in the middle the order is any.
    """
    best = scores[..., sinks:first_recent].topk(free, -1, sorted=False).indices + sinks
    kept = torch.arange(blocks, device=scores.device).expand(*scores.shape[:2], -1)
    return torch.cat((kept[..., :sinks], best, kept[..., first_recent:]), -1)
