"""Sparse decode in plain torch: gather the selected blocks, one batched product each for logits and output.

Layout assumed: keys and values [B, Hkv, capacity, D] contiguous, or one memory for all heads (`gather_blocks`), capacity a
multiple of P, memory past `length` finite (its probability is zero, and zero times NaN would not be). Half-precision blocks
are widened to fp32 after the gather, so that logits are as exact as those of a fused kernel.
"""

import torch
from torch import Tensor


def gather_blocks(stored: Tensor, selection: Tensor, block_size: int) -> Tensor:
    """Return [B, Hs, K * P, D] in fp32: the slots `selection` of `stored` [B, Hkv, capacity, D]; -1 reads slot 0.

    All heads of all rows may be the same memory (strides of 0): then slots are places in that.
    """
    batch, kv_heads, capacity, dim = stored.shape
    selecting, blocks = selection.shape[1], capacity // block_size
    places = selection.clamp_min(0)
    if stored.stride(0) == stored.stride(1) == 0:
        stored = stored[0, 0]
    else:
        head = torch.arange(selecting, device=stored.device) * kv_heads // selecting
        first = (torch.arange(batch, device=stored.device)[:, None] * kv_heads + head) * blocks
        places = places + first[:, :, None]
    whole = stored.view(-1, block_size * dim)
    return whole.index_select(0, places.flatten()).view(batch, selecting, -1, dim).float()


def sparse_decode(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    selection: Tensor,
    length: int,
    *,
    block_size: int,
    scale: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    mask: Tensor | None = None,
    slots: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Same contract as `reference.sparse_decode`."""
    batch, heads, dim = query.shape
    selecting, chosen = selection.shape[1], selection.shape[2]
    places = selection if slots is None else slots
    k = gather_blocks(keys, places, block_size)
    v = gather_blocks(values, places, block_size)
    grouped = query.float().view(batch, selecting, heads // selecting, dim)
    logits = (grouped @ k.transpose(-1, -2)) * scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    tokens = (selection[..., None] * block_size + torch.arange(block_size, device=query.device)).flatten(2)
    allowed = (tokens >= 0) & (tokens < length)
    if mask is not None:
        row = mask[:, None, :length].expand(batch, selecting, length)
        allowed &= row.gather(2, tokens.clamp(0, length - 1))
    logits = logits.masked_fill(~allowed[:, :, None], -torch.inf)
    normaliser = torch.logsumexp(logits, -1)
    if sinks is not None:
        normaliser = torch.logaddexp(normaliser, sinks.float().view(1, selecting, -1))
    probabilities = torch.exp(logits - normaliser[..., None])
    output = (probabilities @ v).view(batch, heads, -1).to(query.dtype)
    maxima = probabilities.unflatten(-1, (chosen, block_size)).amax(-1).amax(2)
    return output, maxima, normaliser.view(batch, heads)
