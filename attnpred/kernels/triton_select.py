"""What selects blocks, on a GPU in Triton (extra `gpu`): products with digests, and the two passes of a streaming memory.

`digest_shares` takes two launches: a softmax over all vectors cannot be known by a program that sees a tile of them. The
first makes of every block the log-sum-exp of its vectors' logits for each query head, and of every tile that of its
blocks; the second has the softmax's denominator from the tiles, and adds up the heads. Codes are read once and unpacked in
registers; the query stays fp32, rounded to tf32 where matrix units take it, which is finer than the int8 of the CPU.

`weigh` and `remember` are one launch each. To choose by the scores is the business of `torch.topk` (`stream.choose`).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from attnpred.kernels.digest import DOUBT, FLOOR, SMALLEST, STEP
from attnpred.kernels.triton_tools import ceil_div, room

TILE_VECTORS = 128
MOST_TILES = 64
"""Tiles of one head that `_shares` reads at a time."""
BLOCKS_AT_ONCE = 512


@triton.jit(do_not_specialize=["blocks", "tiles"])
def _products(
    query, codes, logs, peaks, sums, blocks, tiles, code_row, code_vector,
    step, GROUP: tl.constexpr, HALF: tl.constexpr, VECTORS: tl.constexpr, GROUP_ROOM: tl.constexpr,
    HALF_ROOM: tl.constexpr, BLOCKS: tl.constexpr, PER_BLOCK: tl.constexpr,
):  # fmt: skip
    """One tile of one row: BLOCKS blocks of PER_BLOCK vectors, VECTORS of them real."""
    row, tile = tl.program_id(0), tl.program_id(1)
    g, h, t = tl.arange(0, GROUP_ROOM), tl.arange(0, HALF_ROOM), tl.arange(0, BLOCKS * PER_BLOCK)
    at = query + (row * GROUP + g)[:, None] * (2 * HALF) + h[None, :]
    known = (g < GROUP)[:, None] & (h < HALF)[None, :]
    q_low = tl.load(at, mask=known, other=0.0).to(tl.float32) * step
    q_high = tl.load(at + HALF, mask=known, other=0.0).to(tl.float32) * step
    block, inside = tile * BLOCKS + t // PER_BLOCK, t % PER_BLOCK
    exists = (block < blocks) & (inside < VECTORS)
    vector = (block * VECTORS + inside).to(tl.int64)
    place = codes + row.to(tl.int64) * code_row + vector[:, None] * code_vector + h[None, :]
    code = tl.load(place, mask=exists[:, None] & (h < HALF)[None, :], other=0).to(tl.int32)
    low, high = (code & 15).to(tl.float32) - 7.5, (code >> 4).to(tl.float32) + 0.5  # as `digest.unpack`, without STEP
    logits = tl.dot(q_low, tl.trans(low), input_precision="tf32")
    logits += tl.dot(q_high, tl.trans(high), input_precision="tf32")
    logits = tl.where(exists[None, :], logits, float("-inf"))
    grouped = tl.reshape(logits, (GROUP_ROOM, BLOCKS, PER_BLOCK))
    top = tl.max(grouped, 2)
    base = tl.where(top == float("-inf"), 0.0, top)  # behind the last block
    total = tl.sum(tl.exp(grouped - base[:, :, None]), 2)
    is_block = total > 0.0
    log = tl.where(is_block, base + tl.log(tl.where(is_block, total, 1.0)), float("-inf"))
    n = tile * BLOCKS + tl.arange(0, BLOCKS)
    mine = row * GROUP + g
    fits = (g < GROUP)[:, None] & (n < blocks)[None, :]
    tl.store(logs + mine.to(tl.int64)[:, None] * blocks + n[None, :], log, mask=fits)
    peak = tl.max(log, 1)  # every tile has a block
    tl.store(peaks + mine * tiles + tile, peak, mask=g < GROUP)
    tl.store(sums + mine * tiles + tile, tl.sum(tl.exp(log - peak[:, None]), 1), mask=g < GROUP)


@triton.jit(do_not_specialize=["blocks", "tiles"])
def _shares(
    logs, peaks, sums, out, blocks, tiles, smallest, GROUP: tl.constexpr,
    BLOCKS: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """Of one row and BLOCKS of its blocks, the logarithm of the softmax, added up over the group."""
    row = tl.program_id(0)
    n = tl.program_id(1) * BLOCKS + tl.arange(0, BLOCKS)
    shares = tl.zeros((BLOCKS,), tl.float32)
    for g in range(GROUP):
        head = row * GROUP + g
        peak = tl.full((TILES,), float("-inf"), tl.float32)
        total = tl.zeros((TILES,), tl.float32)
        for first in range(0, tiles, TILES):
            i = first + tl.arange(0, TILES)
            new = tl.load(peaks + head * tiles + i, mask=i < tiles, other=float("-inf"))
            part = tl.load(sums + head * tiles + i, mask=i < tiles, other=0.0)
            higher = tl.maximum(peak, new)
            base = tl.where(higher == float("-inf"), 0.0, higher)
            total = total * tl.exp(peak - base) + part * tl.exp(new - base)
            peak = higher
        top = tl.max(peak, 0)
        whole = top + tl.log(tl.sum(total * tl.exp(peak - top), 0))
        log = tl.load(logs + head.to(tl.int64) * blocks + n, mask=n < blocks, other=float("-inf"))
        shares += tl.exp(log - whole)
    tl.store(out + row.to(tl.int64) * blocks + n, tl.log(tl.maximum(shares, smallest)), mask=n < blocks)


def digest_shares(query: Tensor, codes: Tensor, vectors: int) -> Tensor:
    """Same as `digest.digest_shares_reference`; what lies between the codes of two rows may be anything."""
    rows, group, rank = query.shape
    blocks, half = codes.shape[1] // vectors, rank // 2
    out = torch.empty(rows, blocks, device=query.device, dtype=torch.float32)
    if not out.numel():
        return out
    per_block = room(vectors)
    at_once = max(1, TILE_VECTORS // per_block)
    tiles = ceil_div(blocks, at_once)
    logs = out.new_empty(rows, group, blocks)
    peaks, sums = out.new_empty(rows, group, tiles), out.new_empty(rows, group, tiles)
    with torch.cuda.device_of(query):
        _products[(rows, tiles)](
            query.contiguous(), codes, logs, peaks, sums, blocks, tiles, codes.stride(0), codes.stride(1), STEP,
            group, half, vectors, room(group, 16),
            room(half, 16), at_once, per_block, num_warps=4, enable_fp_fusion=True,
        )  # fmt: skip
        _shares[(rows, ceil_div(blocks, BLOCKS_AT_ONCE))](
            logs, peaks, sums, out, blocks, tiles, SMALLEST, group, BLOCKS_AT_ONCE,
            min(MOST_TILES, room(tiles)), num_warps=4, enable_fp_fusion=True,
        )  # fmt: skip
    return out


@triton.jit(do_not_specialize=["first", "last", "blocks"])
def _weigh(
    estimate, past, weights, distance, out, first, last, blocks, doubt, estimate_batch, estimate_head, past_batch,
    past_head, HEADS: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """BLOCKS of one head's blocks."""
    row = tl.program_id(0)
    batch, head = (row // HEADS).to(tl.int64), row % HEADS
    n = tl.program_id(1) * BLOCKS + tl.arange(0, BLOCKS)
    inner = (n >= first) & (n < last)
    weights += row * 4
    share = tl.load(estimate + batch * estimate_batch + head * estimate_head + n, mask=inner, other=0.0)
    score = share * tl.load(weights)
    score += tl.load(past + batch * past_batch + head * past_head + n, mask=inner, other=0.0) * tl.load(weights + 1)
    score += tl.load(distance + n - first, mask=inner, other=0.0) * tl.load(weights + 2)
    score = tl.where(inner, tl.maximum(score, share - tl.load(weights + 3) - doubt), 0.0)
    tl.store(out + row.to(tl.int64) * blocks + n, score, mask=n < blocks)


def weigh(
    estimate: Tensor, past: Tensor, weights: Tensor, distance: Tensor, first: int, last: int, blocks: int
) -> Tensor:
    """Same as `stream.weigh`; the last dimension of estimate, past and distance is in one piece."""
    batch, heads = past.shape[:2]
    out = torch.empty(batch, heads, blocks, device=estimate.device, dtype=torch.float32)
    with torch.cuda.device_of(estimate):
        _weigh[(batch * heads, ceil_div(blocks, BLOCKS_AT_ONCE))](
            estimate, past, weights.contiguous(), distance, out, first, last, blocks, DOUBT, *estimate.stride()[:2],
            *past.stride()[:2], heads, BLOCKS_AT_ONCE, num_warps=4, enable_fp_fusion=True,
        )  # fmt: skip
    return out


@triton.jit(do_not_specialize=["blocks", "known", "chosen"])
def _remember(
    past, rate, estimate, weights, distance, ids, maxima, blocks, known, chosen, smallest, floor, doubt,
    past_batch, past_head, estimate_batch, estimate_head,
    HEADS: tl.constexpr, BLOCKS: tl.constexpr, CHOSEN: tl.constexpr,
):  # fmt: skip
    """BLOCKS of one head's blocks; of the selection, what lies among them."""
    row, begin = tl.program_id(0), tl.program_id(1) * BLOCKS
    batch, head = (row // HEADS).to(tl.int64), row % HEADS
    past += batch * past_batch + head * past_head
    weights += row * 4
    k, n = tl.arange(0, CHOSEN), begin + tl.arange(0, BLOCKS)
    place = tl.maximum(tl.load(ids + row * chosen + k, mask=k < chosen, other=0), 0)  # -1: as in `stream.remember`
    mine = (k < chosen) & (place >= begin) & (place < begin + BLOCKS)
    true = tl.load(maxima + row * chosen + k, mask=mine, other=1.0)
    true = tl.maximum(tl.log(tl.maximum(true, smallest)), floor)
    old = tl.load(past + place, mask=mine, other=0.0)
    attended = tl.maximum(old + tl.log(1 - rate + rate * tl.exp(true - old)), floor)
    tl.debug_barrier()  # all of the selection's old values are read before any is changed
    before = tl.load(past + n, mask=n < blocks, other=0.0)
    inner = n < known
    share = tl.load(estimate + batch * estimate_batch + head * estimate_head + n, mask=inner, other=0.0)
    guess = share * tl.load(weights)
    guess += before * tl.load(weights + 1) + tl.load(distance + n, mask=inner, other=0.0) * tl.load(weights + 2)
    guess = tl.maximum(guess + tl.load(weights + 3), share - doubt)
    guess = tl.where(inner, tl.minimum(tl.maximum(guess, floor), 0.0), floor)
    guessed = tl.maximum(before + tl.log(1 - rate + rate * tl.exp(guess - before)), floor)
    tl.store(past + n, guessed, mask=n < blocks)
    tl.debug_barrier()  # what was attended has the last word
    tl.store(past + place, attended, mask=mine)


def remember(
    past: Tensor, rate: float, blocks: int, estimate: Tensor, weights: Tensor, distance: Tensor, selection: Tensor,
    maxima: Tensor,
) -> None:  # fmt: skip
    """Same as `stream.remember`, in place; the last dimension of past and estimate is in one piece."""
    batch, heads = past.shape[:2]
    chosen = selection.shape[2]
    with torch.cuda.device_of(past):
        _remember[(batch * heads, ceil_div(blocks, BLOCKS_AT_ONCE))](
            past, rate, estimate, weights.contiguous(), distance, selection.contiguous(), maxima.contiguous(), blocks,
            estimate.shape[-1], chosen, SMALLEST, FLOOR, DOUBT, *past.stride()[:2], *estimate.stride()[:2],
            heads, BLOCKS_AT_ONCE, room(chosen), num_warps=4, enable_fp_fusion=True,
        )  # fmt: skip
