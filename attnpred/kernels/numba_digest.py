"""Scoring by digests, and the selection that follows, by numba (extra `fast`): one call for all heads of a layer.

At a decode step everything a program touches is cold, its own code too, because the model's weights went through the caches
since the last layer: so ten calls cost more than what they do. `choose` is a whole selection in one:

    rows     the query of every head that selects is projected and rounded
    items    products with the codes, and sums per block (`attnpred.kernels.numba_codes`)
    heads    their logarithms, the features weighed, the best blocks (`attnpred.kernels.numba_stream`)

`look` stops before the last step, and `digest_shares` is that for one table of codes and a query that is projected already.
Rows, items and heads are shared out over torch's own threads (`attnpred.kernels.numba_tools`) where that pays. Compiled at
first use, and kept in the user's cache folder.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numba
import numpy as np
import torch
from torch import Tensor

from attnpred.kernels.digest import digest_shares_reference
from attnpred.kernels.numba_codes import VECTORS, finish_row, item, round_row
from attnpred.kernels.numba_stream import choose_row, weigh_row
from attnpred.kernels.numba_tools import compiled, pointer, share_out, take, threads

_PAYS = 1 << 16
"""Bytes of codes from which on it pays to have several threads."""

# What the threads are told, by place.
(
    TAKEN, ROWS, OWN, KV_HEADS, GROUP, DIM, RANK, BLOCKS, QUADS, MOST_ITEMS, QUERY, PROJECTION, PER_BATCH, ROUNDED,
    SCALES, SUMS, FOUND, STARTS, CODES, VECTOR_COUNTS, ESTIMATE, PEAKS, CAPACITY, RATES, WEIGHTS, OWN_WEIGHTS, DISTANCE,
    SINKS, FIRST_RECENT, ZONE_BLOCKS, FREE, SELECTION, DIAGONAL,
) = range(33)  # fmt: skip
FIELDS = 33


@numba.njit
def _step(f: Any, row: int) -> int:
    """Return how many blocks of a row an item has."""
    vectors = numba.carray(pointer(f[VECTOR_COUNTS]), f[KV_HEADS], np.int64)[row // f[OWN] % f[KV_HEADS]]
    return max(1, VECTORS // vectors)


@compiled("void(CPointer(int64))", to_address=True)
def _do_rows(data: Any) -> None:
    """Project and round the query of one row after the other."""
    f = numba.carray(data, FIELDS)
    rank, dim, group, quads = f[RANK], f[DIM], f[GROUP], f[QUADS]
    asked = np.empty((group, rank), np.float32)
    while True:
        row = take(f.ctypes.data)
        if row >= f[ROWS]:
            break
        query = numba.carray(pointer(f[QUERY] + row * group * dim * 4), (group, dim), np.float32)
        if f[DIAGONAL]:
            batch, head = row // f[OWN] // f[KV_HEADS], row // f[OWN] % f[KV_HEADS]
            diagonal = numba.carray(pointer(f[PROJECTION] + (batch * f[PER_BATCH] + head * dim) * 4), dim, np.float32)
            asked[:] = 0
            for i in range(group):
                for d in range(dim):
                    asked[i, d] = query[i, d] * diagonal[d]
        elif f[PROJECTION]:
            batch, head = row // f[OWN] // f[KV_HEADS], row // f[OWN] % f[KV_HEADS]
            at = f[PROJECTION] + (batch * f[PER_BATCH] + head * dim * rank) * 4
            projection = numba.carray(pointer(at), (dim, rank), np.float32)
            asked[:] = 0
            for d in range(dim):
                for i in range(group):
                    for k in range(rank):
                        asked[i, k] += query[i, d] * projection[d, k]
        else:
            asked[:] = query
        pieces = (rank // 2 + 15) // 16
        rounded = numba.carray(pointer(f[ROUNDED]), (f[ROWS], quads, pieces, 2, 4, 64), np.int8)[row]
        scales = numba.carray(pointer(f[SCALES]), (f[ROWS], quads, 16), np.float32)[row]
        rounded[:] = 0
        scales[:] = 0
        round_row(asked, rounded, scales)


@compiled("void(CPointer(int64))", to_address=True)
def _do_items(data: Any) -> None:
    """Do one item after the other, until all threads together have done all."""
    f = numba.carray(data, FIELDS)
    rows, quads, blocks, half = f[ROWS], f[QUADS], f[BLOCKS], f[RANK] // 2
    starts = numba.carray(pointer(f[STARTS]), rows + 1, np.int64)
    codes = numba.carray(pointer(f[CODES]), rows // f[OWN], np.int64)
    counts = numba.carray(pointer(f[VECTOR_COUNTS]), f[KV_HEADS], np.int64)
    sums = numba.carray(pointer(f[SUMS]), (rows, quads, blocks, 4), np.float32)
    found = numba.carray(pointer(f[FOUND]), (rows, quads, f[MOST_ITEMS], 4, 2), np.float32)
    rounded = numba.carray(pointer(f[ROUNDED]), (rows, quads, (half + 15) // 16, 2, 4, 64), np.int8)
    scales = numba.carray(pointer(f[SCALES]), (rows, quads, 16), np.float32)
    row = 0
    while True:
        number = take(f.ctypes.data)
        if number >= starts[rows]:
            break
        while number >= starts[row + 1]:
            row += 1
        step, vectors = _step(f, row), counts[row // f[OWN] % f[KV_HEADS]]
        quad, part = (number - starts[row]) % quads, (number - starts[row]) // quads
        first = part * step
        last = min(first + step, blocks)
        at = codes[row // f[OWN]] + first * vectors * half
        stored = numba.carray(pointer(at), (last - first) * vectors * half, np.int8)
        item(
            stored,
            half,
            rounded[row, quad],
            scales[row, quad],
            vectors,
            sums[row, quad, first:last],
            found[row, quad, part],
        )


@compiled("void(CPointer(int64))", to_address=True)
def _do_heads(data: Any) -> None:
    """Finish one row after the other: its estimate and, if one is wanted, its selection."""
    f = numba.carray(data, FIELDS)
    rows, quads, blocks = f[ROWS], f[QUADS], f[BLOCKS]
    sums = numba.carray(pointer(f[SUMS]), (rows, quads, blocks, 4), np.float32)
    found = numba.carray(pointer(f[FOUND]), (rows, quads, f[MOST_ITEMS], 4, 2), np.float32)
    estimate = numba.carray(pointer(f[ESTIMATE]), (rows, blocks), np.float32)
    bits = numba.carray(pointer(f[ESTIMATE]), (rows, blocks), np.int32)
    sinks, first_recent, free, rates = f[SINKS], f[FIRST_RECENT], f[FREE], f[RATES]
    middle = first_recent - sinks
    scores = np.empty(max(1, middle), np.float32)
    size = sinks + free + f[ZONE_BLOCKS] - first_recent
    while True:
        row = take(f.ctypes.data)
        if row >= rows:
            break
        finish_row(sums[row], found[row], f[GROUP], _step(f, row), estimate[row], bits[row])
        if f[SELECTION]:
            peaks = numba.carray(pointer(f[PEAKS] + row * rates * f[CAPACITY] * 4), (rates, f[CAPACITY]), np.float32)
            weights = numba.carray(pointer(f[WEIGHTS] + row % f[OWN_WEIGHTS] * (2 + rates) * 4), 2 + rates, np.float32)
            distance = numba.carray(pointer(f[DISTANCE]), middle, np.float32)
            weigh_row(
                estimate[row, sinks:first_recent], peaks[:, sinks:first_recent], weights, distance, scores[:middle]
            )
            out = numba.carray(pointer(f[SELECTION] + row * size * 8), size, np.int64)
            choose_row(scores[:middle].view(np.int32), sinks, first_recent, f[ZONE_BLOCKS], free, out)


@compiled("void(int64, int64, int64, int64, int64, int64[::1])")
def _run(parallel: int, count: int, do_rows: int, do_items: int, do_heads: int, f: Any) -> None:
    rows, quads, blocks = f[ROWS], f[QUADS], f[BLOCKS]
    rounded = np.empty(rows * quads * ((f[RANK] // 2 + 15) // 16) * 512, np.int8)
    scales, starts = np.empty(rows * quads * 16, np.float32), np.zeros(rows + 1, np.int64)
    for row in range(rows):
        step = _step(f, row)
        items = (blocks + step - 1) // step
        starts[row + 1] = starts[row] + quads * items
        f[MOST_ITEMS] = max(f[MOST_ITEMS], items)
    sums, found = (
        np.empty(rows * quads * blocks * 4, np.float32),
        np.empty(rows * quads * f[MOST_ITEMS] * 8, np.float32),
    )
    f[ROUNDED], f[SCALES], f[STARTS] = rounded.ctypes.data, scales.ctypes.data, starts.ctypes.data
    f[SUMS], f[FOUND] = sums.ctypes.data, found.ctypes.data
    for work in (do_rows, do_items, do_heads):
        f[TAKEN] = 0
        share_out(parallel, count, work, f.ctypes.data)
    # Numba frees an array after its last use that it sees; what the threads read it does not see.
    rounded[0] = scales[0] = starts[0] = sums[0] = found[0] = f[TAKEN] = 0


class Codes(NamedTuple):
    """Where the codes of B * Hkv rows lie (addresses), and how many vectors a block of each of the Hkv heads has."""

    addresses: Any
    vectors: Any


def codes_of(tables: Sequence[tuple[Sequence[int], int, Tensor]], batch: int, kv_heads: int) -> Codes:
    """Return the codes of tables (their heads, vectors per block, codes [B, heads, capacity, bytes]), which stay alive."""
    addresses, counts = np.zeros((batch, kv_heads), np.int64), np.zeros(kv_heads, np.int64)
    for heads, vectors, codes in tables:
        for i, head in enumerate(heads):
            counts[head] = vectors
            for row in range(batch):
                addresses[row, head] = codes.data_ptr() + row * codes.stride(0) + i * codes.stride(1)
    return Codes(addresses.reshape(-1), counts)


def _call(
    query: Tensor, projection: Tensor | None, codes: Codes, rank: int, blocks: int, selecting: int, total: int,
    chosen: tuple[int, ...] = (),
) -> Tensor:  # fmt: skip
    """Return the estimate [B, Hs, blocks] for query [B, Hq, D] in fp32, in one piece; `total`: bytes of codes."""
    (batch, heads, dim), kv_heads = query.shape, codes.vectors.size
    estimate = torch.empty(batch, selecting, blocks)
    group = heads // selecting
    given = (0, 0) if projection is None else (projection.data_ptr(), projection[0].numel() * (projection.shape[0] > 1))
    f = np.zeros(FIELDS, np.int64)
    f[ROWS : QUADS + 1] = (
        batch * selecting, selecting // kv_heads, kv_heads, group, dim, rank, blocks, (group + 3) // 4,
    )  # fmt: skip
    f[QUERY : PER_BATCH + 1] = (query.data_ptr(), *given)
    f[CODES : ESTIMATE + 1] = codes.addresses.ctypes.data, codes.vectors.ctypes.data, estimate.data_ptr()
    f[PEAKS : PEAKS + len(chosen)] = chosen
    f[DIAGONAL] = projection is not None and projection.ndim == 3
    _run(*threads(total >= _PAYS), _do_rows.address, _do_items.address, _do_heads.address, f)
    return estimate


def _rank(projection: Tensor) -> int:
    size = projection.shape[-1]
    return size if projection.ndim == 4 else size + size % 2


def look(query: Tensor, projection: Tensor, codes: Codes, blocks: int, selecting: int, total: int) -> Tensor:
    """Return [B, Hs, blocks], what `Digest.look` estimates: query [B, Hq, D] in fp32.

    projection [B or 1, Hkv, D, r], or its diagonal [B or 1, Hkv, D], then r is D or, if that is odd, one more.
    """
    return _call(query.contiguous(), projection, codes, _rank(projection), blocks, selecting, total)


def choose(
    query: Tensor, projection: Tensor, codes: Codes, blocks: int, selecting: int, total: int,
    peaks: Tensor, weights: Tensor, distance: Tensor, sinks: int, first_recent: int, zone_blocks: int, free: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return what `look` does, and a selection [B, Hs, K]: `kernels.choose` of what `kernels.weigh` gives for that."""
    assert 0 <= sinks < first_recent <= min(blocks, peaks.shape[3]) and distance.numel() == first_recent - sinks
    assert peaks.is_contiguous() and weights.is_contiguous() and 0 <= free <= first_recent - sinks
    selection = torch.empty(query.shape[0], selecting, sinks + free + zone_blocks - first_recent, dtype=torch.int64)
    told = (
        peaks.data_ptr(), peaks.shape[3], peaks.shape[2], weights.data_ptr(), weights.shape[0], distance.data_ptr(),
        sinks, first_recent, zone_blocks, free, selection.data_ptr(),
    )  # fmt: skip
    found = _call(query.contiguous(), projection, codes, _rank(projection), blocks, selecting, total, told)
    return found, selection


def digest_shares(query: Tensor, codes: Tensor, vectors: int) -> Tensor:
    """Same as `attnpred.kernels.digest.digest_shares`."""
    if codes.device.type != "cpu":
        return digest_shares_reference(query, codes, vectors)
    (rows, group, rank), blocks = query.shape, codes.shape[1] // vectors
    if not rows or not blocks:
        return torch.empty(rows, blocks)
    stored = codes if codes.stride(2) == 1 and codes.stride(1) == codes.shape[2] else codes.contiguous()
    found = codes_of([(range(rows), vectors, stored[None])], 1, rows)
    asked = query.float().reshape(1, rows * group, rank).contiguous()
    return _call(asked, None, found, rank, blocks, rows, codes.numel())[0]
