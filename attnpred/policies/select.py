"""From scores to a selection: what every policy has in common.

A `Zone` says, for a context of a given length, which blocks are sinks, which are recent, and how many may be chosen
between them. Sinks and recent blocks are always in; the rest of the budget goes to the best scores.

The recent window is kept in whole blocks (every block that holds one of the last `recent_window` tokens), which is one
block more than the window's own size when the context does not end on a block. The budget always pays for that block.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from attnpred import kernels
from attnpred.config import CacheConfig
from attnpred.shapes import num_blocks


@dataclass(frozen=True, slots=True)
class Zone:
    """Blocks of a context of `length` tokens: [0, sinks) are kept, [first_recent, blocks) are kept, `free` are chosen."""

    length: int
    blocks: int
    sinks: int
    first_recent: int
    free: int

    @property
    def covers_all(self) -> bool:
        """True where the selection is every block."""
        return self.first_recent - self.sinks <= self.free


def zone_at(config: CacheConfig, length: int) -> Zone:
    """Return the zone of a context of `length` tokens."""
    size = config.block_size
    blocks = num_blocks(length, size)
    sinks = min(config.num_sink_tokens // size, blocks)
    first_recent = max(sinks, (length - config.recent_window) // size, 0)
    widest_recent = config.recent_window // size + 1
    middle = first_recent - sinks
    free = max(0, config.budget_blocks(length) - config.num_sink_tokens // size - widest_recent)
    if config.budget_blocks(length) >= blocks:
        free = middle  # also where the recent window is wider than planned, by the block that is not full
    return Zone(length, blocks, sinks, first_recent, min(free, middle))


def select_blocks(scores: Tensor, zone: Zone, first_block: Tensor | None = None) -> Tensor:
    """Return block ids [B, Hs, K]: sinks, the `zone.free` best-scored blocks between, recent blocks; -1 for none.

    scores [B, Hs, N]; first_block [B] is the block in which each row begins (left padding), whose sinks lie there.
    """
    if first_block is None:
        return kernels.choose(scores, zone.sinks, zone.first_recent, zone.blocks, zone.free)
    batch, heads, _ = scores.shape
    recent = torch.arange(zone.first_recent, zone.blocks, device=scores.device).expand(batch, heads, -1)
    sinks = (torch.arange(zone.sinks, device=scores.device) + first_block[:, None, None]).expand(batch, heads, -1)
    sinks = sinks.masked_fill(sinks >= zone.first_recent, -1)
    candidates = scores[..., zone.sinks : zone.first_recent]
    early = torch.arange(zone.sinks, zone.first_recent, device=scores.device) < first_block[:, None] + zone.sinks
    best = candidates.masked_fill(early[:, None], -torch.inf).topk(zone.free, -1, sorted=False)
    chosen = (best.indices + zone.sinks).masked_fill(best.values == -torch.inf, -1)
    return torch.cat((sinks, chosen, recent), -1)


def without_left_out(selection: Tensor, scores: Tensor, zone: Zone) -> Tensor:
    """Return `selection` with -1 for the chosen blocks whose score [B, Hs, N] is -inf."""
    last = selection.shape[2] - (zone.blocks - zone.first_recent)
    chosen = selection[..., zone.sinks : last]
    left_out = scores.gather(2, chosen.clamp_min(0)) == -torch.inf
    ends = selection[..., : zone.sinks], selection[..., last:]
    return torch.cat((ends[0], chosen.masked_fill(left_out, -1), ends[1]), -1)


def limit_late(scores: Tensor, zone: Zone, forecast: Tensor, late: int, first_block: Tensor | None = None) -> Tensor:
    """Return `scores` with which at most `late` blocks outside `forecast` are chosen: the best of them.

    forecast [B, Hs, zone.free] are block ids between sinks and recent window, -1 for none; all other scores become -inf.
    first_block as in `select_blocks`: what lies before cannot be chosen, and does not count.
    """
    known = torch.zeros(*scores.shape[:2], zone.blocks + 1, dtype=torch.bool, device=scores.device)
    known.scatter_(2, forecast.masked_fill(forecast < 0, zone.blocks), True)
    known = known[..., : zone.blocks]
    outside = scores.masked_fill(known, -torch.inf)
    outside[..., : zone.sinks] = outside[..., zone.first_recent :] = -torch.inf
    if first_block is not None:
        early = torch.arange(zone.blocks, device=scores.device) < first_block[:, None] + zone.sinks
        outside = outside.masked_fill(early[:, None], -torch.inf)
    best = outside.topk(min(late, zone.first_recent - zone.sinks), -1)
    added = torch.full_like(outside, -torch.inf).scatter(2, best.indices, best.values)
    return torch.maximum(scores.masked_fill(~known, -torch.inf), added)
