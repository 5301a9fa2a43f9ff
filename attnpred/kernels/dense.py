"""Attention over everything: the probabilities that history and calibration need, and a dense path with all options.

`dense_attention` exists for models whose attention has a logit softcap or learned sinks, which torch's own fused
attention does not know; everything else takes torch's.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from attnpred.shapes import num_blocks

CHUNK_ELEMENTS = 1 << 24


@dataclass(frozen=True, slots=True)
class AttentionTerms:
    """What a model adds to plain attention: scale of the logits, softcap, sink logits [Hq]."""

    scale: float
    softcap: float | None = None
    sinks: Tensor | None = None


def _logits(query: Tensor, keys: Tensor, terms: AttentionTerms, mask: Tensor | None) -> Tensor:
    """Return masked fp32 logits [B, Hq, Q, L]; without a mask the queries are the last Q of L tokens (causal)."""
    batch, heads, queries, dim = query.shape
    kv_heads, length = keys.shape[1], keys.shape[2]
    grouped = query.float().reshape(batch, kv_heads, -1, dim)
    logits = (grouped @ keys.float().transpose(-1, -2)).view(batch, heads, queries, length) * terms.scale
    if terms.softcap is not None:
        logits = terms.softcap * torch.tanh(logits / terms.softcap)
    if mask is not None:
        return logits.masked_fill(~mask[:, None], -torch.inf)
    if queries > 1:
        future = torch.ones(queries, length, dtype=torch.bool, device=query.device).triu(length - queries + 1)
        logits = logits.masked_fill(future, -torch.inf)
    return logits


def probabilities(query: Tensor, keys: Tensor, terms: AttentionTerms, mask: Tensor | None = None) -> Tensor:
    """Return fp32 attention probabilities [B, Hq, Q, L].

    query [B, Hq, Q, D]; keys [B, Hkv, L, D]; mask [B, Q, L], True where allowed, or None for causal. A query that may
    attend to nothing (padding) gets a row of zeros.
    """
    logits = _logits(query, keys, terms, mask)
    normaliser = torch.logsumexp(logits, -1, keepdim=True)
    if terms.sinks is not None:
        normaliser = torch.logaddexp(normaliser, terms.sinks.float().view(1, -1, 1, 1))
    return torch.exp(logits - normaliser.masked_fill(normaliser == -torch.inf, 0.0))


def _in_chunks(query: Tensor, keys: Tensor, terms: AttentionTerms, mask: Tensor | None) -> Iterator[Tensor]:
    """Yield `probabilities` of successive queries, so that no piece holds more than `CHUNK_ELEMENTS` of them."""
    batch, heads, queries, _ = query.shape
    length = keys.shape[2]
    if mask is None and queries > 1:
        mask = torch.ones(1, queries, length, dtype=torch.bool, device=query.device).tril(length - queries)
    step = max(1, CHUNK_ELEMENTS // (batch * heads * length))
    for start in range(0, queries, step):
        chosen = None if mask is None else mask[:, start : start + step]
        yield probabilities(query[:, :, start : start + step], keys, terms, chosen)


def dense_attention(query: Tensor, keys: Tensor, values: Tensor, terms: AttentionTerms, mask: Tensor | None) -> Tensor:
    """Return [B, Hq, Q, D] in the dtype of the values; shapes as in `probabilities`."""
    batch, heads, _, _ = query.shape
    kv_heads, length = keys.shape[1], keys.shape[2]
    parts = []
    for weights in _in_chunks(query, keys, terms, mask):
        part = weights.to(values.dtype).view(batch, kv_heads, -1, length) @ values
        parts.append(part.view(batch, heads, -1, values.shape[-1]))
    return torch.cat(parts, 2)


def pool_blocks(weights: Tensor, block_size: int, *, total: bool = False) -> Tensor:
    """Pool [..., L] over blocks of P to [..., N], the last block filled up with zeros: maximum, or sum if `total`."""
    length = weights.shape[-1]
    blocks = num_blocks(length, block_size)
    padded = torch.nn.functional.pad(weights, (0, blocks * block_size - length)).unflatten(-1, (blocks, block_size))
    return padded.sum(-1) if total else padded.amax(-1)


def pool_heads(rows: Tensor, selecting: int) -> Tensor:
    """Maximum over the query heads that select together: [B, Hq, ...] to [B, Hs, ...]."""
    return rows.unflatten(1, (selecting, -1)).amax(2)


def attention_rows(
    query: Tensor, keys: Tensor, terms: AttentionTerms, mask: Tensor | None, *, block_size: int, selecting: int
) -> Tensor:
    """Return history rows [B, Hs, Q, N]: true probabilities, pooled over blocks, then over query heads (both maxima)."""
    parts = [
        pool_heads(pool_blocks(weights, block_size), selecting) for weights in _in_chunks(query, keys, terms, mask)
    ]
    return torch.cat(parts, 2)
