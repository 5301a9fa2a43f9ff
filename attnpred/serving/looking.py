"""What a decode step looked at: the blocks of the context with the most attention, over all layers and heads.

A head reads the blocks that were chosen for it, and the kernel tells the largest probability that it gave to a token of
each. A block's weight is the mean of these over the heads of all layers, so 1 is: every head looked there and nowhere else.
First and last tokens get much attention at every step whatever is asked, so they are left out. A dense step chooses nothing,
and there is nothing to tell of it.
"""

from typing import NamedTuple, final

import torch
from torch import Tensor

from attnpred.hf import TieredCache

PASSAGES = 24
"""Blocks that are told of one step."""


class Passage(NamedTuple):
    """Tokens `start` to `stop` of the context, and their weight."""

    start: int
    stop: int
    weight: float


@final
class Look(NamedTuple):
    """passages: heaviest first. share: how much of the context the heads read, their mean."""

    passages: tuple[Passage, ...]
    share: float


def look(cache: TieredCache) -> Look | None:
    """Return what the last step of the one row of `cache` looked at; None if it was dense."""
    size, total, heads, read = cache.settings.block_size, None, 0, 0
    for decoder in cache.decoders.values():
        if decoder.attended is None or decoder.seen is None:
            continue
        zone, selection = decoder.attended
        if total is None:
            total = torch.zeros(zone.blocks, dtype=torch.float32, device="cpu")
        _add(total, selection[0].cpu(), decoder.seen[0].float().cpu(), zone.sinks, zone.first_recent)
        heads, read = heads + selection.shape[1], read + int((selection[0] >= 0).sum())
    if total is None:
        return None
    weights, blocks = (total / heads).topk(min(PASSAGES, len(total)))
    found = (
        Passage(block * size, (block + 1) * size, weight)
        for block, weight in zip(blocks.tolist(), weights.tolist(), strict=True)
        if weight > 0
    )
    return Look(tuple(found), read / heads / len(total))


def _add(total: Tensor, selection: Tensor, seen: Tensor, sinks: int, first_recent: int) -> None:
    """Add what the heads of one layer, [Hs, K], gave to the blocks [N] between sinks and recent window."""
    is_free = (selection >= sinks) & (selection < first_recent)
    total.index_add_(0, selection.clamp_min(0).flatten().long(), seen.masked_fill(~is_free, 0.0).flatten())
