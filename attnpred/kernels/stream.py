"""What a streaming memory does with all blocks at every step: weigh, choose, and remember what was attended.

`attnpred.kernels.numba_stream` has the same functions in one pass each; they are bound by memory and by the number of calls.
"""

import torch
from torch import Tensor

from attnpred.kernels.digest import FLOOR


def weigh(
    estimate: Tensor, peaks: Tensor, weights: Tensor, distance: Tensor, first: int, last: int, blocks: int
) -> Tensor:
    """Return [B, Hs, blocks]: sums weighted with weights [Hs or 1, 2 + T] of blocks `first` to `last`, others zero.

    estimate [B, Hs, N]; peaks [B, Hs, T, capacity]; distance [last - first], the same for all heads.
    """
    score = torch.nn.functional.pad(estimate[..., first:last] * weights[:, :1], (first, blocks - last))
    inner = score[..., first:last]
    for i in range(peaks.shape[2]):
        inner.addcmul_(peaks[:, :, i, first:last], weights[:, 1 + i : 2 + i])
    inner.addcmul_(distance, weights[:, -1:])
    return score


def remember(peaks: Tensor, rates: Tensor, blocks: int, estimate: Tensor, selection: Tensor, maxima: Tensor) -> None:
    """Let the first `blocks` of peaks [B, Hs, T, capacity] fade by rates [T], and raise them to what was just attended.

    That is log(maxima) [B, Hs, K] for the blocks of `selection` [B, Hs, K], -1 for none, and for others, as far as it
    goes, estimate [B, Hs, N].
    """
    used = peaks[..., :blocks]
    # -1 only comes with left padding, where block 0 is padding too: what is written there is never looked at.
    places = selection.clamp_min(0)[:, :, None].expand(-1, -1, peaks.shape[2], -1)
    used.sub_(rates[:, None])
    attended = torch.maximum(used.gather(3, places), torch.log(maxima).clamp_(min=FLOOR)[:, :, None])
    known = used[..., : estimate.shape[-1]]
    torch.maximum(known, estimate[:, :, None], out=known)
    used.scatter_(3, places, attended)


def choose(scores: Tensor, sinks: int, first_recent: int, blocks: int, free: int) -> Tensor:
    """Return ids [B, Hs, K] of the first `sinks` blocks, the `free` best of [sinks, first_recent), and the rest.

    scores [B, Hs, first_recent or more]; in the middle the order is any.
    """
    best = scores[..., sinks:first_recent].topk(free, -1, sorted=False).indices + sinks
    kept = torch.arange(blocks, device=scores.device).expand(*scores.shape[:2], -1)
    return torch.cat((kept[..., :sinks], best, kept[..., first_recent:]), -1)
