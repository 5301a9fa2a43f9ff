"""Which kernel attends: numba's or, on a GPU, Triton's where it is installed and can take the tensors, else torch's.

The choice depends on devices, dtypes and shapes alone, so it is the same for every token of a model.
"""

from importlib.util import find_spec

import torch
from torch import Tensor

from attnpred.kernels import torch as plain

HAS_NUMBA, HAS_TRITON = (find_spec(name) is not None for name in ("numba", "triton"))
PIECE = 1024
"""Tokens that a thread takes at once in a dense call."""


def numba_serves(query: Tensor, keys: Tensor, values: Tensor, block_size: int = 16) -> bool:
    """True where numba's kernels are there and can take these tensors: keys, values [B, Hkv, T, D]."""
    if not HAS_NUMBA:
        return False
    from attnpred.kernels import numba_decode  # numba is loaded when it is used, not before

    return numba_decode.serves(query, keys, values, block_size)


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
    """Same contract as `reference.sparse_decode`, by the fastest kernel for these tensors."""
    kernel = plain.sparse_decode
    if numba_serves(query, keys, values, block_size):
        from attnpred.kernels import numba_decode

        kernel = numba_decode.sparse_decode
    elif query.is_cuda and HAS_TRITON and not (query.requires_grad and torch.is_grad_enabled()):
        from attnpred.kernels import triton_decode

        kernel = triton_decode.sparse_decode
    return kernel(
        query, keys, values, selection, length,
        block_size=block_size, scale=scale, softcap=softcap, sinks=sinks, mask=mask, slots=slots,
    )  # fmt: skip


def dense_decode_torch(query: Tensor, keys: Tensor, values: Tensor, *, scale: float) -> tuple[Tensor, Tensor]:
    """Attend with one query per row, [B, Hq, D], to all of keys [B, Hkv, T, D]; return output [B, Hq, Dv], log-sum-exp."""
    batch, heads, dim = query.shape
    grouped = query.float().reshape(batch, keys.shape[1], -1, dim)
    logits = (grouped @ keys.float().transpose(-1, -2)) * scale
    normaliser = logits.logsumexp(-1)
    output = torch.softmax(logits, -1) @ values.float()
    return output.reshape(batch, heads, -1).to(query.dtype), normaliser.view(batch, heads)


def dense_decode_numba(query: Tensor, keys: Tensor, values: Tensor, *, scale: float) -> tuple[Tensor, Tensor]:
    """Same as `dense_decode_torch`, every key and value read once."""
    from attnpred.kernels import numba_decode

    parts = numba_decode.dense_parts(query, keys, values, PIECE, scale)
    output, normaliser = numba_decode.merged([parts], *query.shape[:2])
    return output.to(query.dtype), normaliser


def dense_decode(query: Tensor, keys: Tensor, values: Tensor, *, scale: float) -> tuple[Tensor, Tensor]:
    """Same contract as `dense_decode_torch`, by the fastest kernel for these tensors."""
    kernel = dense_decode_numba if numba_serves(query, keys, values) else dense_decode_torch
    return kernel(query, keys, values, scale=scale)
