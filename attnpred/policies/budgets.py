"""How many blocks each kv head may choose: as many as the others, by given weights, or where the scores are high.

With weights or "adaptive" the free blocks of a layer (`Zone.free` for each kv head) are dealt out anew, so that the layer
attends to as many blocks as before, or a few less by rounding. A head that may choose fewer has -1 in its other places.

adaptive: one pool of scores for all heads of the layer, and the best of them are chosen, but every head has at least `FLOOR`
of an even share (Ada-KV, arXiv 2407.11550, algorithm 1, whose floor is alpha = 0.2). It compares scores of different heads,
which means something where they are probabilities or their logarithms, as those of this library's policies are.
"""

import torch
from torch import Tensor

from attnpred.policies.select import Zone

FLOOR = 0.2


def counts_for(budgets: str | tuple[float, ...], scores: Tensor, zone: Zone) -> Tensor:
    """Return how many blocks between sinks and recent window each head may choose, [B, Hs], from scores [B, Hs, N].

    budgets: "adaptive", or a weight for each kv head, of which only the proportions count.
    """
    batch, heads, _ = scores.shape
    middle = zone.first_recent - zone.sinks
    if not isinstance(budgets, str):
        weights = torch.tensor(budgets, device=scores.device, dtype=torch.float32).repeat_interleave(
            heads // len(budgets)
        )
        shares = (weights * (zone.free * heads / weights.sum())).floor().long()
        return shares.clamp(max=middle).expand(batch, -1)
    floor = int(FLOOR * zone.free)
    ordered = scores[..., zone.sinks : zone.first_recent].float().sort(-1, descending=True).values
    ordered[..., :floor] = torch.inf
    best = ordered.flatten(1).topk(zone.free * heads, -1).indices // max(1, middle)
    return torch.zeros(batch, heads, dtype=torch.long, device=scores.device).scatter_add(1, best, torch.ones_like(best))


def select_ragged(scores: Tensor, zone: Zone, counts: Tensor, first_block: Tensor | None = None) -> Tensor:
    """Return block ids [B, Hs, K] as `select_blocks` does, with `counts` [B, Hs] blocks chosen by each head; -1 for none.

    first_block [B] is the block in which each row begins (left padding).
    """
    blocks = torch.arange(zone.blocks, device=scores.device)
    middle = scores[..., zone.sinks : zone.first_recent].float()
    sinks = blocks[: zone.sinks].expand(*counts.shape, -1)
    if first_block is not None:
        sinks = sinks + first_block[:, None, None]
        sinks = sinks.masked_fill(sinks >= zone.first_recent, -1)
        early = blocks[zone.sinks : zone.first_recent] < first_block[:, None] + zone.sinks
        middle = middle.masked_fill(early[:, None], -torch.inf)
        counts = counts.minimum((~early).sum(-1)[:, None])
    width = int(counts.max()) if counts.numel() else 0
    chosen = middle.topk(width, -1).indices + zone.sinks
    chosen = chosen.masked_fill(torch.arange(width, device=scores.device) >= counts[..., None], -1)
    return torch.cat((sinks, chosen, blocks[zone.first_recent :].expand(*counts.shape, -1)), -1)


def union_scores(scores: Tensor, kv_heads: int) -> Tensor:
    """Return scores [B, Hkv, N] by which a group chooses what its query heads want most, from [B, Hq, N].

    Every head in turn names its best block that nobody has named: a block counts by the best rank that a head gives it,
    and between equal ranks by the score itself. So the union of the heads' choices has the size of one.
    """
    ranks = scores.float().argsort(-1, descending=True).argsort(-1)
    grouped = ranks.unflatten(1, (kv_heads, -1))
    best = grouped.amin(2)
    tie = torch.softmax(scores.float(), -1).unflatten(1, (kv_heads, -1)).amax(2)  # below 1, so ranks stay apart
    return tie * 0.99 - best
