"""`KeySummary`: what the neighbours keep of a block's keys, in full precision: the mean, or the bounds of every channel.

The bounds give Quest's score (arXiv 2406.10774): no key of the block can have a larger product with the query than
sum over channels of max(q * low, q * high).
"""

from typing import final

import torch
from torch import Tensor

from attnpred.kernels.digest import FLOOR
from attnpred.predictor.block_summary import BlockSummary


def log_shares(logits: Tensor, selecting: int) -> Tensor:
    """Return [B, Hs, N]: the logarithm of the softmax over blocks of `logits` [B, Hq, N], summed over each head's queries.

    Each query head has a normaliser of its own, or a head with large logits would choose for its whole group.
    """
    return torch.softmax(logits, -1).unflatten(1, (selecting, -1)).sum(2).log_().clamp_(min=FLOOR)


@final
class KeySummary(BlockSummary):
    """Mean key, or the smallest and largest value of each channel, of every sealed block; `estimate` as in `Digest`."""

    def __init__(self, block_size: int, *, bounds: bool) -> None:
        super().__init__(block_size)
        self.bounds = bounds

    def summary(self, blocks: Tensor) -> Tensor:
        return torch.cat((blocks.amin(3), blocks.amax(3)), -1) if self.bounds else blocks.mean(3)

    def shares(self, query: Tensor, scale: float, selecting: int) -> Tensor:
        table = self.table.view().float()
        grouped = query.float().unflatten(1, (table.shape[1], -1)) * scale
        if self.bounds:
            grouped = torch.cat((grouped.clamp_max(0), grouped.clamp_min(0)), -1)
        return log_shares((grouped @ table.transpose(-1, -2)).flatten(1, 2), selecting)
