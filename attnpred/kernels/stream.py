"""What a streaming memory does with all blocks at every step: weigh them, and remember what was attended. In torch.

`attnpred.kernels.numba_stream` has the same functions in one pass each; they are bound by memory and by the number of calls.
"""

import torch
from torch import Tensor

from attnpred.kernels.digest import FLOOR


def weigh(estimate: Tensor, peaks: Tensor, weights: Tensor, distance: Tensor, first: int, last: int) -> Tensor:
    """Return [B, Hs, last - first], sums weighted with weights [Hs or 1, 2 + T] of blocks `first` to `last`.

    estimate [B, Hs, N]; peaks [B, Hs, T, capacity]; distance [last - first], the same for all heads.
    """
    score = estimate[..., first:last] * weights[:, :1]
    for i in range(peaks.shape[2]):
        score.addcmul_(peaks[:, :, i, first:last], weights[:, 1 + i : 2 + i])
    return score.addcmul_(distance, weights[:, -1:])


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


def best(scores: Tensor, count: int) -> Tensor:
    """Return the places [B, Hs, count] of the largest of scores [B, Hs, N], in any order."""
    return scores.topk(count, -1, sorted=False).indices
