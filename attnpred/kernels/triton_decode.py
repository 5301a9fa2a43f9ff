"""Sparse decode on a GPU in Triton (extra `gpu`): the chosen blocks are read once for all heads of a group.

Two launches, as in flash decoding. `_attend` has a program for each selecting head and part of its selection (`cut`
makes enough parts to fill the GPU): it reads its blocks a tile at a time, keeps a running softmax, and leaves its
output, its largest logit and its sum, and the largest logit of every block for every query head. `_merge` adds the
parts up, with the sink of the head, and makes probabilities of the logits of blocks. Nothing waits for the GPU, and no
shape depends on what a tensor holds.

Matrix units want 16 rows, so a smaller group is filled up with zeros; D, Dv and the block size are filled up to powers
of two. Nothing that may not be attended to is read, so memory behind `length` may hold anything. Logits are fp32 sums
of exact products; half-precision values are multiplied with probabilities rounded to their type, as everywhere on GPUs.

Without a GPU the same code runs in Triton's interpreter (TRITON_INTERPRET=1 in the environment of the process).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from attnpred.kernels.triton_tools import TILE_BYTES, ceil_div, cut, interpreted, room

BLOCKS_AT_ONCE = 256
"""Blocks whose maxima one program of `_merge` makes."""


@triton.jit(do_not_specialize=["length", "chosen", "per_split"])
def _attend(
    query, keys, values, ids, places, mask, found, peaks, sums, tops,
    length, chosen, per_split, scale, softcap,
    key_batch, key_head, key_token, key_one,
    value_batch, value_head, value_token, value_one, mask_batch, mask_token,
    KV_HEADS: tl.constexpr, SELECTING: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    P: tl.constexpr, GROUP_ROOM: tl.constexpr, D_ROOM: tl.constexpr, DV_ROOM: tl.constexpr, BLOCKS: tl.constexpr,
    PER_BLOCK: tl.constexpr, HAS_MASK: tl.constexpr, IS_CAPPED: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """One part of one selecting head; a tile is BLOCKS blocks of PER_BLOCK tokens, of larger blocks a piece."""
    row, split, splits = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    batch = (row // SELECTING).to(tl.int64)  # 64 bits: a cache may have more numbers than 32 bits can count
    head = (row % SELECTING * KV_HEADS // SELECTING).to(tl.int64)
    keys += batch * key_batch + head * key_head
    values += batch * value_batch + head * value_head
    mask += batch * mask_batch
    g, d, dv = tl.arange(0, GROUP_ROOM), tl.arange(0, D_ROOM), tl.arange(0, DV_ROOM)
    t, j = tl.arange(0, BLOCKS * PER_BLOCK), tl.arange(0, BLOCKS)
    mine = row * GROUP + g
    q = tl.load(query + mine[:, None] * D + d[None, :], mask=(g < GROUP)[:, None] & (d < D)[None, :], other=0.0)
    if WIDEN:
        q = q.to(tl.float32)
    peak = tl.full((GROUP_ROOM,), float("-inf"), tl.float32)
    total = tl.zeros((GROUP_ROOM,), tl.float32)
    output = tl.zeros((GROUP_ROOM, DV_ROOM), tl.float32)
    for first in range(split * per_split, tl.minimum((split + 1) * per_split, chosen), BLOCKS):
        i = first + t // PER_BLOCK
        block = tl.load(ids + row * chosen + i, mask=i < chosen, other=-1).to(tl.int64)
        place = tl.load(places + row * chosen + i, mask=i < chosen, other=0).to(tl.int64)
        top = tl.full((GROUP_ROOM, BLOCKS), float("-inf"), tl.float32)
        for piece in range(0, P, PER_BLOCK):  # once, unless a block is larger than a tile
            inside = piece + t % PER_BLOCK
            token, at = block * P + inside, place * P + inside
            allowed = (block >= 0) & (inside < P) & (token < length)
            if HAS_MASK:
                allowed = allowed & (tl.load(mask + token * mask_token, mask=allowed, other=0) != 0)
            at_key = at[:, None] * key_token + d[None, :] * key_one
            k = tl.load(keys + at_key, mask=allowed[:, None] & (d < D)[None, :], other=0.0)
            if WIDEN:
                k = k.to(tl.float32)
            logits = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
            if IS_CAPPED:
                small = tl.exp(-2.0 * tl.abs(logits / softcap))
                capped = softcap * (1.0 - small) / (1.0 + small)  # tanh, which Triton's language does not have
                logits = tl.where(logits < 0.0, -capped, capped)
            logits = tl.where(allowed[None, :], logits, float("-inf"))
            top = tl.maximum(top, tl.max(tl.reshape(logits, (GROUP_ROOM, BLOCKS, PER_BLOCK)), 2))
            higher = tl.maximum(peak, tl.max(logits, 1))
            base = tl.where(higher == float("-inf"), 0.0, higher)  # so that of nothing the sum is 0, and not NaN
            weights = tl.exp(logits - base[:, None])
            fade = tl.exp(peak - base)
            at_value = at[:, None] * value_token + dv[None, :] * value_one
            v = tl.load(values + at_value, mask=allowed[:, None] & (dv < DV)[None, :], other=0.0)
            if WIDEN:
                v = v.to(tl.float32)
            total = total * fade + tl.sum(weights, 1)
            output = output * fade[:, None] + tl.dot(weights.to(v.dtype), v, input_precision="ieee")
            peak = higher
        fits = (g < GROUP)[:, None] & (first + j < chosen)[None, :]
        tl.store(tops + mine[:, None] * chosen + (first + j)[None, :], top, mask=fits)
    part = mine * splits + split
    tl.store(peaks + part, peak, mask=g < GROUP)
    tl.store(sums + part, total, mask=g < GROUP)
    tl.store(found + part[:, None] * DV + dv[None, :], output, mask=(g < GROUP)[:, None] & (dv < DV)[None, :])


@triton.jit
def _sum(peaks, sums, sinks, head, sink, splits, ROOM: tl.constexpr, HAS_SINKS: tl.constexpr):
    """Return the largest logit of a query head, 0 for none, and the sum of all parts relative to it."""
    s = tl.arange(0, ROOM)
    peak = tl.load(peaks + head * splits + s, mask=s < splits, other=float("-inf"))
    total = tl.load(sums + head * splits + s, mask=s < splits, other=0.0)
    base = tl.max(peak, 0)
    if HAS_SINKS:
        extra = tl.load(sinks + sink).to(tl.float32)
        base = tl.maximum(base, extra)
    base = tl.where(base == float("-inf"), 0.0, base)
    total = tl.sum(total * tl.exp(peak - base), 0)
    if HAS_SINKS:
        total += tl.exp(extra - base)
    return base, total


@triton.jit(do_not_specialize=["chosen", "splits"])
def _merge(
    found, peaks, sums, tops, sinks, output, maxima, normaliser,
    chosen, splits, SELECTING: tl.constexpr, GROUP: tl.constexpr, DV: tl.constexpr, DV_ROOM: tl.constexpr,
    ROOM: tl.constexpr, BLOCKS: tl.constexpr, HAS_SINKS: tl.constexpr,
):  # fmt: skip
    """The first GROUP programs of a selecting head make the output of a query head each, the others the block maxima."""
    row, task = tl.program_id(0), tl.program_id(1)
    sink = row % SELECTING * GROUP
    if task < GROUP:
        head = row * GROUP + task
        base, total = _sum(peaks, sums, sinks, head, sink + task, splits, ROOM, HAS_SINKS)
        dv = tl.arange(0, DV_ROOM)
        result = tl.zeros((DV_ROOM,), tl.float32)
        for first in range(0, splits, 16):
            s = first + tl.arange(0, 16)
            weight = tl.exp(tl.load(peaks + head * splits + s, mask=s < splits, other=float("-inf")) - base)
            at = (head * splits + s)[:, None] * DV + dv[None, :]
            part = tl.load(found + at, mask=(s < splits)[:, None] & (dv < DV)[None, :], other=0.0)
            result += tl.sum(part * weight[:, None], 0)
        whole = tl.where(total == 0.0, 1.0, total)  # a NaN stays one
        tl.store(output + head * DV + dv, (result / whole).to(output.dtype.element_ty), mask=dv < DV)
        tl.store(normaliser + head, tl.where(total == 0.0, float("-inf"), base + tl.log(whole)))
    else:
        i = (task - GROUP) * BLOCKS + tl.arange(0, BLOCKS)
        largest = tl.zeros((BLOCKS,), tl.float32)
        for g in range(GROUP):
            head = row * GROUP + g
            base, total = _sum(peaks, sums, sinks, head, sink + g, splits, ROOM, HAS_SINKS)
            top = tl.load(tops + head * chosen + i, mask=i < chosen, other=float("-inf"))
            largest = tl.maximum(largest, tl.exp(top - base) / tl.where(total == 0.0, 1.0, total))
        tl.store(maxima + row * chosen + i, largest, mask=i < chosen)


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
    """Same contract as `reference.sparse_decode`; a row that may attend to nothing gets zeros, and -inf as log-sum-exp.

    keys and values may have any strides.
    """
    (batch, heads, dim), value_dim = query.shape, values.shape[3]
    selecting, chosen = selection.shape[1], selection.shape[2]
    rows, group = batch * selecting, heads // selecting
    key_room, value_room = room(dim, 16), room(value_dim, 16)
    width = max(key_room, value_room) * keys.element_size()
    blocks, per_block, splits, per_split = cut(rows, chosen, block_size, width, query.device)
    # The interpreter multiplies the bits of bfloat16 (3.7), so there the product is one of fp32.
    mixed = not query.dtype == keys.dtype == values.dtype
    widen = mixed or (interpreted() and keys.dtype == torch.bfloat16)

    def new(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=query.device)

    found, peaks, sums = new(rows, group, splits, value_dim), new(rows, group, splits), new(rows, group, splits)
    tops, output = new(rows, group, chosen), new(batch, heads, value_dim, dtype=query.dtype)
    maxima, normaliser = new(batch, selecting, chosen), new(batch, heads)
    ids = selection.contiguous()
    places = ids if slots is None else slots.contiguous()
    seen = ids if mask is None else mask.view(torch.uint8)
    with torch.cuda.device_of(query):  # Triton launches on the current device
        _attend[(rows, splits)](
            query.contiguous(), keys, values, ids, places, seen, found, peaks, sums, tops,
            length, chosen, per_split, scale, softcap or 1.0,
            *keys.stride(), *values.stride(), seen.stride(0), seen.stride(1),
            keys.shape[1], selecting, group, dim, value_dim, block_size,
            room(group, 16), key_room, value_room, blocks, per_block,
            mask is not None, softcap is not None, widen,
            num_warps=4, enable_fp_fusion=True,
            num_stages=2 if width * blocks * per_block <= TILE_BYTES and not widen else 1,
        )  # fmt: skip
        _merge[(rows, group + ceil_div(chosen, BLOCKS_AT_ONCE))](
            found, peaks, sums, tops, normaliser if sinks is None else sinks.contiguous(), output, maxima, normaliser,
            chosen, splits, selecting, group, value_dim, value_room, room(splits),
            BLOCKS_AT_ONCE, sinks is not None, enable_fp_fusion=True,
        )  # fmt: skip
    return output, maxima, normaliser
