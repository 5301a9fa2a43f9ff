"""Attention of several queries over blocks that lie anywhere, other blocks for every kv head: what eviction has left.

The dense path of an evicting policy (a chunk of a prompt, a second turn, drafted tokens): `sparse_decode` is for one query,
and pieces of a context are the same tokens for all heads. Logits are in fp32; callers give some queries at a time.
"""

import torch
from torch import Tensor

from attnpred.kernels.dense import AttentionTerms
from attnpred.kernels.torch import gather_blocks

QUERIES = 128
"""How many queries are taken at once, so that their logits do not outgrow the keys."""


def attend_blocks(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    selection: Tensor,
    slots: Tensor,
    position: int,
    terms: AttentionTerms,
    mask: Tensor | None,
    block_size: int,
) -> tuple[Tensor, Tensor]:
    """Return the attention [B, Hq, Q, Dv] and its block maxima [B, Hkv, Q, K], over the query heads that share keys.

    query [B, Hq, Q, D], whose first token is at `position` of the context; keys [B, Hkv, slots * P, D], values [..., Dv];
    selection, slots [B, Hkv, K]: blocks, -1 for none, and where they lie; mask [B, Q, L], True where allowed, or None:
    causal, and nothing behind the last query is read either way.
    """
    batch, heads, queries, _ = query.shape
    kv_heads, chosen = selection.shape[1], selection.shape[2]
    k, v = (gather_blocks(stored, slots, block_size) for stored in (keys, values))
    tokens = (selection[..., None] * block_size + torch.arange(block_size, device=query.device)).flatten(2)
    own = torch.arange(position, position + queries, device=query.device)
    allowed = (tokens >= 0)[:, :, None] & (tokens[:, :, None] <= own[:, None])  # [B, Hkv, Q, T]
    if mask is not None:
        shown = mask[:, None].expand(batch, kv_heads, queries, -1)
        places = tokens.clamp(0, mask.shape[2] - 1)[:, :, None].expand(-1, -1, queries, -1)
        allowed = allowed & shown.gather(3, places)
    grouped = query.float().reshape(batch, kv_heads, -1, query.shape[3])
    logits = (grouped @ k.transpose(-1, -2)).view(batch, kv_heads, -1, queries, k.shape[2]).mul_(terms.scale)
    if terms.softcap is not None:
        logits = terms.softcap * torch.tanh(logits / terms.softcap)
    logits = logits.masked_fill(~allowed[:, :, None], -torch.inf)
    normaliser = logits.logsumexp(-1)
    if terms.sinks is not None:
        normaliser = torch.logaddexp(normaliser, terms.sinks.float().view(1, kv_heads, -1, 1))
    weights = torch.exp(logits - normaliser.masked_fill(normaliser == -torch.inf, 0.0)[..., None])  # zeros for padding
    output = (weights.flatten(2, 3) @ v).view(batch, heads, queries, -1).to(query.dtype)
    return output, weights.amax(2).unflatten(-1, (chosen, block_size)).amax(-1)
