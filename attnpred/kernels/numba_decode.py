"""`sparse_decode` and dense decoding by numba (extra `fast`): tensors in, tensors out; the work is in `numba_items`.

Asks for what `serves` says; `attnpred.kernels.decoding` has the rest done by torch.
"""

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from attnpred.kernels import numba_items as work
from attnpred.kernels.numba_tools import address, threads

KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
"""Numbers that stored keys and values may have, as the vectors know them."""
ITEM_TOKENS = 256
"""Selected tokens of an item."""
UNIT = 16
"""Tokens of a dense call that are taken as one block."""


def item_fields(
    query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, length: int, size: int, count: int, per_item: int,
    selecting: int, ids: int = 0, slots: int = 0,
) -> Any:  # fmt: skip
    """Return what the threads are told of query [B, Hq, D] in fp32 or bf16; ids, slots: addresses, 0 for all blocks."""
    batch, heads, dim = query.shape
    assert mask is None or (mask.stride(-1) == 1 and mask.dtype == torch.bool and mask.shape[-1] >= length)
    shown, stride = (
        (address(mask, torch.bool), mask.stride(0) if mask.shape[0] > 1 else 0) if mask is not None else (0, 0)
    )
    width = keys.element_size()
    return np.array(
        [
            0, batch, selecting, -(-count // per_item), per_item, count, heads // selecting, dim, values.shape[3], size,
            KINDS[keys.dtype], length, keys.shape[1], keys.stride(1) * width, values.stride(1) * width,
            address(keys, *KINDS), address(values, keys.dtype), address(query, torch.float32, torch.bfloat16), ids, slots, shown, stride, 0, 0, 0, 0, 0,
            query.dtype == torch.bfloat16,
        ],
        np.int64,
    )  # fmt: skip


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
    """Same contract as `reference.sparse_decode`, for what it `serves`; a row that may attend to nothing gets zeros."""
    batch, heads, _ = query.shape
    selecting, chosen = selection.shape[1], selection.shape[2]
    asked, ids = _readable(query), selection.contiguous()
    places = ids if slots is None else slots.contiguous()
    output = torch.empty(batch, heads, values.shape[3], dtype=asked.dtype, device="cpu")
    normaliser = torch.empty(batch, heads, dtype=torch.float32, device="cpu")
    maxima = torch.empty(batch, selecting, chosen, dtype=torch.float32, device="cpu")
    extra = None if sinks is None else sinks.float()
    mask = None if mask is None else _in_one_piece(mask)
    fields = item_fields(
        asked, keys, values, mask, length, block_size, chosen, max(1, ITEM_TOKENS // block_size), selecting,
        address(ids, torch.int64), address(places, torch.int64),
    )  # fmt: skip
    work.decode(
        *threads(), work.do_items.address, fields, scale, softcap or 0.0, _sinks_at(extra),
        address(output, asked.dtype), address(normaliser, torch.float32), address(maxima, torch.float32),
    )  # fmt: skip
    return output if asked.dtype == query.dtype else output.to(query.dtype), maxima, normaliser


class Parts(NamedTuple):
    """What the pieces of a dense call found, before they are brought to one maximum; quads are query heads in fours.

    tops, sums [B * Hkv, pieces, quads, 4], found [B * Hkv, pieces, quads, 4, Dv].
    """

    tops: Tensor
    sums: Tensor
    found: Tensor


def dense_parts(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    piece: int,
    scale: float,
    softcap: float | None = None,
    mask: Tensor | None = None,
) -> Parts:
    """Return the parts of query [B, Hq, D] over all of keys [B, Hkv, T, D], one for each `piece` tokens (in `UNIT`s).

    mask [B or 1, T]. Parts of successive keys, each but the last of whole pieces, are the same as those of all at once.
    """
    batch, heads, _ = query.shape
    kv_heads, tokens, dim = keys.shape[1], keys.shape[2], values.shape[3]
    asked = _readable(query)
    count = -(-tokens // UNIT)
    mask = None if mask is None else _in_one_piece(mask)
    fields = item_fields(asked, keys, values, mask, tokens, UNIT, count, piece // UNIT, kv_heads)
    rows, quads, items = batch * kv_heads, -(-heads // kv_heads // 4), int(fields[work.ITEMS])
    maxima, found = (
        torch.empty(rows, quads, count, 4, dtype=torch.float32, device="cpu"),
        torch.empty(rows, items, quads, 4, dim, dtype=torch.float32, device="cpu"),
    )
    parts = Parts(
        torch.empty(rows, items, quads, 4, dtype=torch.float32, device="cpu"),
        torch.empty(rows, items, quads, 4, dtype=torch.float32, device="cpu"),
        found,
    )
    fields[work.MAXIMA], fields[work.TOPS] = address(maxima, torch.float32), address(parts.tops, torch.float32)
    fields[work.SUMS], fields[work.FOUND] = address(parts.sums, torch.float32), address(found, torch.float32)
    work.parts_alone(*threads(), work.do_items.address, fields, scale, softcap or 0.0)
    return parts


def merged(parts: list[Parts], batch: int, heads: int, sinks: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return output [B, Hq, Dv] and log-sum-exp [B, Hq], in fp32, of the parts of successive keys."""
    tops, sums, found = parts[0] if len(parts) == 1 else (torch.cat(same, 1) for same in zip(*parts, strict=True))
    rows, items, _, _, dim = found.shape
    output, normaliser = (
        torch.empty(batch, heads, dim, dtype=torch.float32, device="cpu"),
        torch.empty(batch, heads, dtype=torch.float32, device="cpu"),
    )
    extra = None if sinks is None else sinks.float()
    fields = np.zeros(work.FIELDS, np.int64)
    fields[work.BATCH], fields[work.SELECTING], fields[work.ITEMS] = batch, rows // batch, items
    fields[work.GROUP], fields[work.VALUE_DIM] = heads * batch // rows, dim
    fields[work.TOPS], fields[work.SUMS], fields[work.FOUND] = (address(x, torch.float32) for x in (tops, sums, found))
    work.merge_parts(fields, _sinks_at(extra), address(output, torch.float32), address(normaliser, torch.float32))
    return output, normaliser


def _readable(query: Tensor) -> Tensor:
    """Return the query in one piece, in fp32 or bf16."""
    return (query if query.dtype in (torch.float32, torch.bfloat16) else query.float()).contiguous()


def _sinks_at(sinks: Tensor | None) -> int:
    """Return the address of the attention sinks' logits, 0 for none."""
    return 0 if sinks is None else address(sinks, torch.float32)


def _in_one_piece(mask: Tensor) -> Tensor:
    return mask if mask.stride(-1) == 1 else mask.contiguous()


def serves(query: Tensor, keys: Tensor, values: Tensor, block_size: int = 16) -> bool:
    """True where the kernels here can take these tensors; query and keys may have any number of dimensions in front."""
    return (
        keys.dtype in KINDS
        and values.dtype == keys.dtype
        and keys.device.type == "cpu"
        and keys.shape[3] % 16 == 0
        and values.shape[3] % 16 == 0
        and block_size % 4 == 0
        and _is_regular(keys)
        and _is_regular(values)
        and not (query.requires_grad and torch.is_grad_enabled())
    )


def _is_regular(stored: Tensor) -> bool:
    """True where heads follow each other at one distance, and the tokens of a head lie side by side."""
    batch, head, token, one = stored.stride()
    apart = batch == head * stored.shape[1] or stored.shape[0] == 1
    return one == 1 and token == stored.shape[3] and apart
