"""Attention over everything: its terms, its logits, and the probabilities by their definition.

`attnpred.kernels.streamed` computes the same in pieces; `probabilities` is the definition of correct beside it.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from attnpred.shapes import num_blocks


@dataclass(frozen=True, slots=True)
class AttentionTerms:
    """What a model adds to plain attention: scale of the logits, softcap, sink logits [Hq]."""

    scale: float
    softcap: float | None = None
    sinks: Tensor | None = None


def masked_logits(query: Tensor, keys: Tensor, terms: AttentionTerms, allowed: Tensor | None) -> Tensor:
    """Return fp32 logits [B, Hq, Q, T] of query [B, Hq, Q, D], keys [B, Hkv, T, D]; -inf where not `allowed` [B, Q, T]."""
    batch, heads, queries, dim = query.shape
    kv_heads, length = keys.shape[1], keys.shape[2]
    grouped = query.float().reshape(batch, kv_heads, -1, dim)
    logits = (grouped @ keys.float().transpose(-1, -2)).view(batch, heads, queries, length).mul_(terms.scale)
    if terms.softcap is not None:
        logits = terms.softcap * torch.tanh(logits / terms.softcap)
    return logits if allowed is None else logits.masked_fill_(~allowed[:, None], -torch.inf)


def probabilities(query: Tensor, keys: Tensor, terms: AttentionTerms, mask: Tensor | None = None) -> Tensor:
    """Return fp32 attention probabilities [B, Hq, Q, L].

    query [B, Hq, Q, D]; keys [B, Hkv, L, D]; mask [B, Q, L], True where allowed, or None: the queries are the last Q of L
    tokens (causal). A query that may attend to nothing (padding) gets a row of zeros.
    """
    queries, length = query.shape[2], keys.shape[2]
    if mask is None and queries > 1:
        mask = torch.ones(1, queries, length, dtype=torch.bool, device=query.device).tril(length - queries)
    logits = masked_logits(query, keys, terms, mask)
    normaliser = torch.logsumexp(logits, -1, keepdim=True)
    if terms.sinks is not None:
        normaliser = torch.logaddexp(normaliser, terms.sinks.float().view(1, -1, 1, 1))
    return torch.exp(logits - normaliser.masked_fill(normaliser == -torch.inf, 0.0))


def pool_blocks(weights: Tensor, block_size: int, *, total: bool = False) -> Tensor:
    """Pool [..., L] over blocks of P to [..., N], the last block filled up with zeros: maximum, or sum if `total`."""
    length = weights.shape[-1]
    blocks = num_blocks(length, block_size)
    padded = torch.nn.functional.pad(weights, (0, blocks * block_size - length)).unflatten(-1, (blocks, block_size))
    return padded.sum(-1) if total else padded.amax(-1)


def pool_heads(rows: Tensor, selecting: int) -> Tensor:
    """Maximum over the query heads that select together: [B, Hq, ...] to [B, Hs, ...]."""
    return rows.unflatten(1, (selecting, -1)).amax(2)
