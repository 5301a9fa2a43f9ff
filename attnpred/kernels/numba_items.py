"""The work of decoding, compiled by numba: every key and value is read once for all query heads that share it.

    item     `ITEM_TOKENS` of selected blocks (or one piece of successive tokens) of one kv head, for all query heads that
             share it: logits from the keys, their maximum per block and per query, powers of two, then the weighted values
    merge    the items of a head are brought to one maximum and added up, always in the same order

An item is one unit of work for a thread (`attnpred.kernels.numba_tools`) and one unit of rounding: what it gives depends on
nothing but its own keys and values, so dense attention has the same bits whether all pieces lie side by side or come one
by one from a slow tier. While a block is worked on the next one is fetched, line by line: at a step all of it is cold, and a
burst of loads would stop the thread.

Vectors and their loops are in `attnpred.kernels.numba_vectors`. Asks for head dimensions in sixteens and blocks in fours;
`attnpred.kernels.decoding` has the rest done by torch. Logits are in units of log 2 throughout.
"""

import math
from typing import Any

import numba
import numpy as np

from attnpred.kernels.numba_team import share_out
from attnpred.kernels.numba_tools import compiled, narrow, pointer, take, widen
from attnpred.kernels.numba_vectors import NONE, add_weighted, dots, powers

LOG2E = math.log2(math.e)
_NONE = np.float32(NONE)

# What the threads are told, by place.
(
    TAKEN, BATCH, SELECTING, ITEMS, PER_ITEM, COUNT, GROUP, DIM, VALUE_DIM, SIZE, KIND, LENGTH, KV_HEADS, KEY_STRIDE,
    VALUE_STRIDE, KEYS, VALUES, QUERY, IDS, SLOTS, MASK, MASK_STRIDE, MAXIMA, TOPS, SUMS, FOUND, SOFTCAP, NARROW,
) = range(28)  # fmt: skip
FIELDS = 28


@numba.njit
def _logits_of(kind: int, keys: int, dim: int, fours: int, query: int, out: int, top: int, ahead: int) -> None:
    """Write the products of 4 * fours keys with four queries, [tokens, 4], and the largest of each, [4]."""
    if kind == 1:
        dots(1, keys, dim, fours, query, out, top, ahead)
    elif kind == 0:
        dots(0, keys, dim, fours, query, out, top, ahead)
    else:
        dots(2, keys, dim, fours, query, out, top, ahead)


@numba.njit
def _add_values(kind: int, values: int, dim: int, tokens: int, weights: int, out: int, ahead: int) -> None:
    """Add to out [4, dim] the values of `tokens`, weighted with weights [tokens, 4]."""
    if kind == 1:
        add_weighted(1, values, dim, tokens, weights, out, ahead)
    elif kind == 0:
        add_weighted(0, values, dim, tokens, weights, out, ahead)
    else:
        add_weighted(2, values, dim, tokens, weights, out, ahead)


@numba.njit
def _shape(at: int, size: int, maxima: Any, highest: int, first: int, mask: int, length: int, softcap: Any) -> None:
    """Cap the logits [size, 4] of the block that begins with token `first`, forbid some; maxima from `highest` on follow."""
    logits = numba.carray(pointer(at), (size, 4), np.float32)
    if softcap > 0:
        for i in range(size):
            for q in range(4):
                logits[i, q] = softcap * math.tanh(logits[i, q] / softcap)
    for i in range(0 if first < 0 else max(0, length - first), size):
        logits[i, :] = _NONE
    if mask and first >= 0:
        allowed = numba.carray(pointer(mask), length, np.uint8)
        for i in range(min(size, length - first)):
            if not allowed[first + i]:
                logits[i, :] = _NONE
    for q in range(4):
        maxima[highest + q] = _NONE
        for i in range(size):
            maxima[highest + q] = max(maxima[highest + q], logits[i, q])


@numba.njit
def _copied(target: Any, start: int, source: int, count: int) -> int:
    """Copy `count` bytes to `target` from `start` on; return the address."""
    target[start : start + count] = numba.carray(pointer(source), count, np.uint8)
    return target.ctypes.data + start


@numba.njit
def _item(fields: Any, row: int, part: int) -> None:
    """Attend to one item: part `part` of the blocks of head `row` of all B * Hs."""
    selecting, per_item, count, size = fields[SELECTING], fields[PER_ITEM], fields[COUNT], fields[SIZE]
    dim, value_dim, kind, length = fields[DIM], fields[VALUE_DIM], fields[KIND], fields[LENGTH]
    quads = (fields[GROUP] + 3) // 4
    batch, head = row // selecting, row % selecting * fields[KV_HEADS] // selecting
    width = 4 if kind == 0 else 2
    keys = fields[KEYS] + (batch * fields[KV_HEADS] + head) * fields[KEY_STRIDE]
    values = fields[VALUES] + (batch * fields[KV_HEADS] + head) * fields[VALUE_STRIDE]
    key_block, value_block = size * dim * width, size * value_dim * width
    mask = fields[MASK] + batch * fields[MASK_STRIDE] if fields[MASK] else 0
    softcap = numba.carray(pointer(fields[SOFTCAP]), 1, np.float32)[0]
    first, last = part * per_item, min(part * per_item + per_item, count)
    taken = last - first
    ids, places = np.empty(taken + 1, np.int64), np.empty(taken + 1, np.int64)
    for i in range(taken):
        ids[i] = places[i] = first + i
    if fields[IDS]:
        chosen = numba.carray(pointer(fields[IDS]), (fields[BATCH] * selecting, count), np.int64)
        slots = numba.carray(pointer(fields[SLOTS]), (fields[BATCH] * selecting, count), np.int64)
        for i in range(taken):
            ids[i], places[i] = chosen[row, first + i], max(0, slots[row, first + i])
    places[taken] = places[taken - 1]
    # Slices of arrays cost more than what is done with them, so blocks are gone through by address.
    scratch = np.empty(quads * taken * size * 4, np.float32)
    logits, at_quad = scratch.ctypes.data, taken * size * 16
    own = row * fields[ITEMS] + part
    tops = numba.carray(pointer(fields[TOPS] + own * quads * 16), quads * 4, np.float32)
    sums = fields[SUMS] + own * quads * 16
    found = fields[FOUND] + own * quads * 16 * value_dim
    maxima = numba.carray(pointer(fields[MAXIMA] + row * quads * count * 16), quads * count * 4, np.float32)
    query = fields[QUERY] + row * quads * 16 * dim
    spare = np.zeros(key_block + value_block if not fields[IDS] and last * size > length else 0, np.uint8)
    tops[:] = _NONE
    for i in range(taken):
        ahead = keys + places[i + 1] * key_block if i + 1 < taken else values + places[0] * value_block
        at = keys + places[i] * key_block
        is_last = (ids[i] + 1) * size > length
        if spare.size and is_last:  # nothing need lie behind the last token of a piece
            at = _copied(spare, 0, at, (length - ids[i] * size) * dim * width)
        for quad in range(quads):
            out, highest = logits + quad * at_quad + i * size * 16, (quad * count + first + i) * 4
            _logits_of(kind, at, dim, size // 4, query + quad * 16 * dim, out, maxima.ctypes.data + highest * 4, ahead)
            if is_last or mask or softcap > 0 or ids[i] < 0:
                _shape(out, size, maxima, highest, ids[i] * size, mask, length, softcap)
            for q in range(4):
                tops[quad * 4 + q] = max(tops[quad * 4 + q], maxima[highest + q])
    for quad in range(quads):
        powers(logits + quad * at_quad, taken * size // 4, tops.ctypes.data + quad * 16, sums + quad * 16)
        for q in range(4):
            if tops[quad * 4 + q] == _NONE:  # nothing was allowed, so that everything is the largest
                numba.carray(pointer(sums + quad * 16), 4, np.float32)[q] = 0
                numba.carray(pointer(logits + quad * at_quad), (taken * size, 4), np.float32)[:, q] = 0
    numba.carray(pointer(found), quads * 4 * value_dim, np.float32)[:] = 0
    for i in range(taken):
        at, ahead = values + places[i] * value_block, values + places[i + 1] * value_block
        if spare.size and (ids[i] + 1) * size > length:
            at = _copied(spare, key_block, at, (length - ids[i] * size) * value_dim * width)
        for quad in range(quads):
            weights = logits + quad * at_quad + i * size * 16
            _add_values(kind, at, value_dim, size, weights, found + quad * 16 * value_dim, ahead)
    scratch[:0] = spare[:0] = 0  # numba frees an array after its last use that it sees


@compiled("void(CPointer(int64))", to_address=True)
def do_items(data: Any) -> None:
    """Do one item after the other, until all threads together have done all."""
    fields = numba.carray(data, FIELDS)
    while True:
        item = take(fields.ctypes.data)
        if item >= fields[BATCH] * fields[SELECTING] * fields[ITEMS]:
            break
        _item(fields, item // fields[ITEMS], item % fields[ITEMS])


@numba.njit
def _parts(parallel: int, count: int, work: int, fields: Any, scale: Any, softcap: Any) -> None:
    """Do all items; `fields` say of what, and where their parts go. The query is brought to quads and units first."""
    rows, group, dim = fields[BATCH] * fields[SELECTING], fields[GROUP], fields[DIM]
    query = np.empty((rows, group, dim), np.float32)
    widen(fields[QUERY], fields[NARROW], 0, query)
    padded = np.zeros((rows, (group + 3) // 4 * 4, dim), np.float32)
    factor, cap = np.float32(scale * np.float32(LOG2E)), np.full(1, softcap * np.float32(LOG2E), np.float32)
    for row in range(rows):
        for i in range(group):
            for d in range(dim):
                padded[row, i, d] = query[row, i, d] * factor
    fields[TAKEN], fields[QUERY], fields[SOFTCAP] = 0, padded.ctypes.data, cap.ctypes.data
    share_out(parallel, count, work, fields.ctypes.data)
    # Numba frees an array after its last use that it sees; what the threads read it does not see.
    padded[0, 0, 0] = cap[0] = 0


@numba.njit
def _merge(fields: Any, sinks: int, output: int, normaliser: int, blocks: int) -> None:
    """Bring all items to one maximum: output [B * Hs, G, Dv], normaliser [B * Hs, G], block maxima [B * Hs, K] or 0."""
    rows, items, group, count = fields[BATCH] * fields[SELECTING], fields[ITEMS], fields[GROUP], fields[COUNT]
    quads, value_dim = (group + 3) // 4, fields[VALUE_DIM]
    tops = numba.carray(pointer(fields[TOPS]), (rows, items, quads, 4), np.float32)
    sums = numba.carray(pointer(fields[SUMS]), (rows, items, quads, 4), np.float32)
    found = numba.carray(pointer(fields[FOUND]), (rows, items, quads, 4, value_dim), np.float32)
    maxima = numba.carray(pointer(fields[MAXIMA]), (rows, quads, count, 4), np.float32)
    outputs = numba.carray(pointer(output), (rows, group, value_dim), np.float32)
    normalisers = numba.carray(pointer(normaliser), (rows, group), np.float32)
    extra = numba.carray(pointer(sinks), fields[SELECTING] * group, np.float32)
    outputs[:] = 0
    shares, zeros = np.zeros((count + 3) // 4 * 16, np.float32), np.zeros(8, np.float32)
    factors = np.empty(items, np.float32)
    for row in range(rows):
        for quad in range(quads):
            less = np.full(4, np.float32(3e38), np.float32)
            for q in range(min(4, group - 4 * quad)):
                query, highest, total = 4 * quad + q, _NONE, np.float32(0)
                for item in range(items):
                    highest = max(highest, tops[row, item, quad, q])
                if sinks:
                    own = extra[row % fields[SELECTING] * group + query] * np.float32(LOG2E)
                    highest = max(highest, own)
                    total += np.float32(2) ** (own - highest)
                for item in range(items):
                    factors[item] = np.float32(2) ** (tops[row, item, quad, q] - highest)
                    total += sums[row, item, quad, q] * factors[item]
                if total == 0:  # nothing was allowed
                    normalisers[row, query] = -np.inf
                    continue
                for item in range(items):
                    share = factors[item] / total
                    for i in range(value_dim):
                        outputs[row, query, i] += share * found[row, item, quad, q, i]
                less[q] = highest + np.log2(total)
                normalisers[row, query] = less[q] / np.float32(LOG2E)
            if blocks:
                for i in range(count):
                    for q in range(4):
                        shares[4 * i + q] = min(np.float32(0), maxima[row, quad, i, q] - less[q])
                powers(shares.ctypes.data, (count + 3) // 4, zeros.ctypes.data, zeros[4:].ctypes.data)
                largest = numba.carray(pointer(blocks), (rows, count), np.float32)
                for i in range(count):
                    if quad == 0:
                        largest[row, i] = 0
                    for q in range(4):
                        largest[row, i] = max(largest[row, i], shares[4 * i + q])
    shares[0:1] = zeros[:1] = 0


@numba.njit
def decode_all(
    parallel: int, count: int, work: int, fields: Any, scale: Any, softcap: Any, sinks: int, output: int,
    normaliser: int, blocks: int,
) -> None:  # fmt: skip
    """All of it; the last four are addresses. With NARROW, query and output are bf16."""
    rows, items, quads = fields[BATCH] * fields[SELECTING], fields[ITEMS], (fields[GROUP] + 3) // 4
    maxima, tops = np.empty((rows, quads, fields[COUNT], 4), np.float32), np.empty((rows, items, quads, 4), np.float32)
    sums = np.empty((rows, items, quads, 4), np.float32)
    found = np.empty((rows, items, quads, 4, fields[VALUE_DIM]), np.float32)
    fields[MAXIMA], fields[TOPS] = maxima.ctypes.data, tops.ctypes.data
    fields[SUMS], fields[FOUND] = sums.ctypes.data, found.ctypes.data
    _parts(parallel, count, work, fields, scale, softcap)
    wide = np.empty(rows * fields[GROUP] * fields[VALUE_DIM] if fields[NARROW] else 0, np.float32)
    _merge(fields, sinks, wide.ctypes.data if wide.size else output, normaliser, blocks)
    if wide.size:
        narrow(wide, output)
    maxima[0, 0, 0, 0] = tops[0, 0, 0, 0] = sums[0, 0, 0, 0] = found[0, 0, 0, 0, 0] = 0  # they were in use until here


@compiled("void(int64, int64, int64, int64[::1], float32, float32, int64, int64, int64, int64)")
def decode(
    parallel: int, count: int, work: int, fields: Any, scale: Any, softcap: Any, sinks: int, output: int,
    normaliser: int, blocks: int,
) -> None:  # fmt: skip
    decode_all(parallel, count, work, fields, scale, softcap, sinks, output, normaliser, blocks)


@compiled("void(int64, int64, int64, int64[::1], float32, float32)")
def parts_alone(parallel: int, count: int, work: int, fields: Any, scale: Any, softcap: Any) -> None:
    _parts(parallel, count, work, fields, scale, softcap)


@compiled("void(int64[::1], int64, int64, int64)")
def merge_parts(fields: Any, sinks: int, output: int, normaliser: int) -> None:
    _merge(fields, sinks, output, normaliser, 0)
