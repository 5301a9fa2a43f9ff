"""`block_logits`: the exact attention that some blocks would get, for policies that measure before they choose."""

import torch
from torch import Tensor

from attnpred.kernels.torch import gather_blocks


def block_logits(
    query: Tensor,
    keys: Tensor,
    blocks: Tensor,
    length: int,
    *,
    block_size: int,
    scale: float,
    softcap: float | None = None,
    mask: Tensor | None = None,
    slots: Tensor | None = None,
) -> Tensor:
    """Return [B, Hq, S]: the logarithm of the summed exponentials of each block's logits, -inf where none is allowed.

    query [B, Hq, D]; keys [B, Hkv, slots * P, D]; blocks [B, Hq, S] ids, each query head its own; the rest as in
    `reference.sparse_decode`.
    """
    stored = gather_blocks(keys, blocks if slots is None else slots, block_size)
    logits = (query.float()[:, :, None] @ stored.transpose(-1, -2))[:, :, 0] * scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    tokens = (blocks[..., None] * block_size + torch.arange(block_size, device=query.device)).flatten(2)
    allowed = (tokens >= 0) & (tokens < length)
    if mask is not None:
        row = mask[:, None, :length].expand(*tokens.shape[:2], length)
        allowed &= row.gather(2, tokens.clamp(0, length - 1))
    return logits.masked_fill(~allowed, -torch.inf).unflatten(2, (-1, block_size)).logsumexp(-1)
