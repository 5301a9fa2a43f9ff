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
from attnpred.kernels.numba_team import share_out
from attnpred.kernels.numba_tools import address, compiled, pointer, take, threads, widen

_PAYS = 1 << 16
"""Bytes of codes from which on it pays to have several threads."""

# What the threads are told, by place: of this call, of the layer (`Prepared`), of the choice, and of scratch memory.
(
    TAKEN, ROWS, OWN, GROUP, BLOCKS, QUADS, QUERY, QUERY_KIND, ESTIMATE,
    KV_HEADS, DIM, RANK, PROJECTION, PER_BATCH, CODES, VECTOR_COUNTS,
    PAST, CAPACITY, WEIGHTS, DISTANCE, SINKS, FIRST_RECENT, ZONE_BLOCKS, FREE, SELECTION,
    MOST_ITEMS, ROUNDED, SCALES, SUMS, FOUND, STARTS,
) = range(31)  # fmt: skip
FIELDS = 31
_NO_CHOICE, _NO_SCRATCH = (0,) * 9, (0,) * 6


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
    asked, query = np.empty((group, rank), np.float32), np.empty((group, dim), np.float32)
    while True:
        row = take(f.ctypes.data)
        if row >= f[ROWS]:
            break
        widen(f[QUERY], f[QUERY_KIND], row * query.size, query)
        if f[PROJECTION]:
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
    sinks, first_recent, free = f[SINKS], f[FIRST_RECENT], f[FREE]
    middle = first_recent - sinks
    scores = np.empty(max(1, middle), np.float32)
    size = sinks + free + f[ZONE_BLOCKS] - first_recent
    while True:
        row = take(f.ctypes.data)
        if row >= rows:
            break
        finish_row(sums[row], found[row], f[GROUP], _step(f, row), estimate[row], bits[row])
        if f[SELECTION]:
            past = numba.carray(pointer(f[PAST] + row * f[CAPACITY] * 4), f[CAPACITY], np.float32)
            weights = numba.carray(pointer(f[WEIGHTS] + row * 16), 4, np.float32)
            distance = numba.carray(pointer(f[DISTANCE]), middle, np.float32)
            weigh_row(estimate[row, sinks:first_recent], past[sinks:first_recent], weights, distance, scores[:middle])
            out = numba.carray(pointer(f[SELECTION] + row * size * 8), size, np.int64)
            choose_row(scores[:middle].view(np.int32), sinks, first_recent, f[ZONE_BLOCKS], free, out)


@numba.njit
def select(parallel: int, count: int, do_rows: int, do_items: int, do_heads: int, f: Any) -> None:
    """Do all of it, by what the fields say; the functions are those of `WORKS`."""
    f[MOST_ITEMS] = 0
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


@compiled("void(int64, int64, int64, int64, int64, int64[::1])")
def _run(parallel: int, count: int, do_rows: int, do_items: int, do_heads: int, f: Any) -> None:
    select(parallel, count, do_rows, do_items, do_heads, f)


WORKS = (_do_rows, _do_items, _do_heads)


class Prepared(NamedTuple):
    """What is the same in every step of a layer, as long as its tables of codes lie where they are.

    key: what it is for, as whoever keeps it says; told: fields KV_HEADS to VECTOR_COUNTS; block_bytes: codes of one block of
    all heads; alive: what the addresses belong to. A copy of whoever keeps it has other addresses, and gets None.
    """

    key: tuple[float, ...]
    told: tuple[int, ...]
    block_bytes: int
    alive: tuple[Any, ...]

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        return None


def prepare(
    tables: Sequence[tuple[Sequence[int], int, Tensor]], batch: int, kv_heads: int, dim: int, projection: Tensor | None,
    key: tuple[float, ...] = (),
) -> Prepared:  # fmt: skip
    """Return what `look` and `choose` need of tables: their heads, vectors per block, codes [B, heads, capacity, bytes].

    projection [B or 1, Hkv, D, r]; None where queries are projected already.
    """
    addresses, counts, size = np.zeros((batch, kv_heads), np.int64), np.zeros(kv_heads, np.int64), 0
    for heads, vectors, codes in tables:
        size += batch * len(heads) * codes.stride(2)
        lies = address(codes, torch.int8)
        for i, head in enumerate(heads):
            counts[head] = vectors
            for row in range(batch):
                addresses[row, head] = lies + row * codes.stride(0) + i * codes.stride(1)
    rank, given = dim, (0, 0)
    if projection is not None:
        rank = projection.shape[-1]
        given = address(projection, torch.float32), projection[0].numel() if projection.shape[0] > 1 else 0
    told = (kv_heads, dim, rank, *given, addresses.ctypes.data, counts.ctypes.data)
    return Prepared(key, told, size, (addresses, counts, projection, *(codes for _, _, codes in tables)))


def _call(
    query: Tensor, prepared: Prepared, blocks: int, selecting: int, chosen: tuple[int, ...] = _NO_CHOICE
) -> Tensor:
    """Return the estimate [B, Hs, blocks] for query [B, Hq, D]; chosen: fields PAST to SELECTION."""
    # Few and plain operations: at a decode step the interpreter is as cold as the data.
    batch, heads, _ = query.shape
    kind = 1 if query.dtype == torch.bfloat16 else 0
    asked = query.contiguous() if kind or query.dtype == torch.float32 else query.float().contiguous()
    estimate = torch.empty(batch, selecting, blocks, dtype=torch.float32, device="cpu")
    group = heads // selecting
    fields = np.array(
        (
            0, batch * selecting, selecting // prepared.told[0], group, blocks, (group + 3) // 4,
            address(asked, torch.float32, torch.bfloat16), kind, address(estimate, torch.float32), *prepared.told, *chosen, *_NO_SCRATCH,
        ),
        np.int64,
    )  # fmt: skip
    pays = blocks * prepared.block_bytes >= _PAYS
    _run(*threads(pays), *(work.address for work in WORKS), fields)
    return estimate


def look(query: Tensor, prepared: Prepared, blocks: int, selecting: int) -> Tensor:
    """Return [B, Hs, blocks], what `Digest.look` estimates for query [B, Hq, D]."""
    return _call(query, prepared, blocks, selecting)


def choose(
    query: Tensor, prepared: Prepared, blocks: int, selecting: int,
    past: Tensor, weights: Tensor, distance: Tensor, sinks: int, first_recent: int, zone_blocks: int, free: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return what `look` does, and a selection [B, Hs, K]: `kernels.choose` of what `kernels.weigh` gives for that."""
    middle, capacity = first_recent - sinks, past.shape[3]
    assert 0 <= sinks < first_recent <= min(blocks, capacity) and 0 <= free <= middle == distance.numel()
    assert past.is_contiguous() and weights.is_contiguous() and weights.shape[1:] == (selecting, 4)
    selection = torch.empty(
        query.shape[0], selecting, sinks + free + zone_blocks - first_recent, dtype=torch.int64, device="cpu"
    )
    told = (
        address(past, torch.float32), capacity, address(weights, torch.float32), address(distance, torch.float32),
        sinks, first_recent, zone_blocks, free, address(selection, torch.int64),
    )  # fmt: skip
    return _call(query, prepared, blocks, selecting, told), selection


def digest_shares(query: Tensor, codes: Tensor, vectors: int) -> Tensor:
    """Same as `attnpred.kernels.digest.digest_shares`."""
    if codes.device.type != "cpu":
        return digest_shares_reference(query, codes, vectors)
    (rows, group, rank), blocks = query.shape, codes.shape[1] // vectors
    if not rows or not blocks:
        return torch.empty(rows, blocks, dtype=torch.float32, device="cpu")
    stored = codes if codes.stride(2) == 1 and codes.stride(1) == codes.shape[2] else codes.contiguous()
    prepared = prepare([(range(rows), vectors, stored[None])], 1, rows, rank, None)
    return _call(query.float().reshape(1, rows * group, rank), prepared, blocks, rows)[0]
