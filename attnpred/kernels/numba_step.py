"""The attention of a decode step of one layer as compiled code: append, seal, choose, attend, add the rest, remember.

Each part is what the step without it calls (`attnpred.decode`), so both find the same; what is left out is to look things
up, to check, and to make tensors. All that is told lies in fields, which whoever plans the step fills (`attnpred.plan`).
"""

from typing import Any, NamedTuple

import numba
import numpy as np
import torch
from torch import Tensor

from attnpred.kernels import numba_digest as choice
from attnpred.kernels import numba_items as items
from attnpred.kernels import numba_rest as rest
from attnpred.kernels import numba_stream as stream
from attnpred.kernels.digest import STEP
from attnpred.kernels.numba_decode import ITEM_TOKENS, KINDS, item_fields
from attnpred.kernels.numba_layer import store
from attnpred.kernels.numba_team import share_out
from attnpred.kernels.numba_tools import address, pointer, widen
from attnpred.kernels.rest import RestTerms

(
    KEYS, VALUES, CAPACITY, KIND, SIZE, BATCH, KV_HEADS, DIM, SCALE,
    CENTRE, TO_KEYS, RANK, CODES, CODES_CAPACITY, DISTANCES, DISTANCE_COUNT,
    CHOICE, ITEMS, MEMORY, QUERY, PER_ITEM, REST, SELECTION, SEEN, SINKS, FIRST_RECENT, BLOCKS, FREE,
) = range(28)  # fmt: skip
"""Of a layer. KEYS, VALUES [B, Hkv, CAPACITY, DIM], numbers of KIND; CENTRE [B, Hkv, DIM] and TO_KEYS [B, Hkv, DIM, RANK] of
its digests, CODES [B, Hkv, CODES_CAPACITY, RANK / 2]; DISTANCES: logarithms, the last is of the newest sealed block; CHOICE,
ITEMS, MEMORY: fields of the three parts; SCALE: scale and soft cap; REST and what follows: of the token; REST: fields of the
estimate of what is left out, 0 for none; SEEN: what it gives to the blocks of its selection."""
FIELDS = 28
_MIDDLE = np.float32(7.5)


@numba.njit
def append(f: Any, found: Any, length: int) -> None:
    """Write key and value of found [B, Hq + 2 Hkv, D] behind `length` tokens."""
    kv_heads, dim, kind = f[KV_HEADS], f[DIM], f[KIND]
    first, size = found.shape[1] - 2 * kv_heads, dim * (4 - 2 * kind)
    for row in range(f[BATCH]):
        for head in range(kv_heads):
            at = ((row * kv_heads + head) * f[CAPACITY] + length) * size
            store(found[row, first + head], kind, f[KEYS] + at)
            store(found[row, first + kv_heads + head], kind, f[VALUES] + at)


@numba.njit
def _seal(f: Any, block: int) -> None:
    """Write the codes of a block that is full."""
    size, dim, rank = f[SIZE], f[DIM], f[RANK]
    keys, mean, found = np.empty((size, dim), np.float32), np.empty(dim, np.float32), np.empty(rank, np.float32)
    for row in range(f[BATCH] * f[KV_HEADS]):
        centre = numba.carray(pointer(f[CENTRE] + row * dim * 4), dim, np.float32)
        maps = numba.carray(pointer(f[TO_KEYS] + row * dim * rank * 4), (dim, rank), np.float32)
        codes = numba.carray(pointer(f[CODES] + (row * f[CODES_CAPACITY] + block) * (rank // 2)), rank // 2, np.int8)
        widen(f[KEYS], f[KIND], (row * f[CAPACITY] + block * size) * dim, keys)
        mean[:] = 0
        for token in range(size):
            for d in range(dim):
                mean[d] += keys[token, d]
        found[:] = 0
        for d in range(dim):
            for k in range(rank):
                found[k] += (mean[d] / np.float32(size) - centre[d]) * maps[d, k]
        for k in range(rank):
            found[k] = min(max(np.rint(found[k] / np.float32(STEP) + _MIDDLE), np.float32(0)), np.float32(15))
        for k in range(rank // 2):
            codes[k] = np.int8((int(found[rank // 2 + k]) - 8) * 16 + int(found[k]))


@numba.njit
def _add_rest(f: Any, out: Any, normaliser: Any, maxima: Any) -> None:
    """Add to out [B, Hq, D] an estimate of what was left out, and make maxima [B Hkv K] shares of everything."""
    r, shares = numba.carray(pointer(f[REST]), rest.FIELDS, np.int64), np.empty(normaliser.size, np.float32)
    r[rest.OUTPUT] = r[rest.RESULT] = out.ctypes.data
    r[rest.QUERY], r[rest.NORMALISER], r[rest.SHARE] = f[QUERY], normaliser.ctypes.data, shares.ctypes.data
    rest.add_heads(r)
    group, rows = r[rest.GROUP], f[BATCH] * f[KV_HEADS]
    chosen = maxima.size // rows
    for row in range(rows):
        kept = np.float32(1) - shares[row * group : (row + 1) * group].sum() / np.float32(group)
        for i in range(row * chosen, (row + 1) * chosen):
            maxima[i] *= kept


@numba.njit
def attend(parallel: int, count: int, works: Any, f: Any, found: Any, length: int, out: Any) -> None:
    """Attend with the query of found [B, Hq + 2 Hkv, D], the last of `length` tokens, and remember: out [B, Hq, D]."""
    size, heads = f[SIZE], out.shape[1]
    sealed = length // size
    if length % size == 0:
        _seal(f, sealed - 1)
    query = numba.carray(pointer(f[QUERY]), out.shape, np.float32)
    query[:] = found[:, :heads]
    farthest = f[DISTANCES] + (f[DISTANCE_COUNT] - sealed) * 4
    chosen = f[SINKS] + f[FREE] + f[BLOCKS] - f[FIRST_RECENT]
    c = numba.carray(pointer(f[CHOICE]), choice.FIELDS, np.int64)
    c[choice.BLOCKS], c[choice.QUERY], c[choice.QUERY_KIND] = sealed, f[QUERY], 0
    c[choice.DISTANCE], c[choice.SELECTION] = farthest + 4 * f[SINKS], f[SELECTION]
    c[choice.SINKS], c[choice.FIRST_RECENT] = f[SINKS], f[FIRST_RECENT]
    c[choice.ZONE_BLOCKS], c[choice.FREE] = f[BLOCKS], f[FREE]
    choice.select(parallel, count, works[1], works[2], works[3], c)
    t = numba.carray(pointer(f[ITEMS]), items.FIELDS, np.int64)
    t[items.COUNT], t[items.ITEMS] = chosen, (chosen + f[PER_ITEM] - 1) // f[PER_ITEM]
    t[items.LENGTH], t[items.QUERY], t[items.IDS], t[items.SLOTS] = length, f[QUERY], f[SELECTION], f[SELECTION]
    scale = numba.carray(pointer(f[SCALE]), 2, np.float32)
    rows = out.shape[0] * t[items.SELECTING]
    normaliser = np.empty(out.shape[0] * heads, np.float32)
    items.decode_all(
        parallel, count, works[4], t, scale[0], scale[1], 0, out.ctypes.data, normaliser.ctypes.data, f[SEEN]
    )
    if f[REST] != 0:
        _add_rest(f, out, normaliser, numba.carray(pointer(f[SEEN]), rows * chosen, np.float32))
    m = numba.carray(pointer(f[MEMORY]), stream.FIELDS, np.int64)
    m[0], m[1], m[2], m[3], m[5] = 0, rows, f[BLOCKS], sealed, chosen
    m[7], m[9], m[10], m[11] = c[choice.ESTIMATE], farthest, f[SELECTION], f[SEEN]
    share_out(parallel, count, works[5], m.ctypes.data)
    # Numba frees an array after its last use that it sees; what the threads read it does not see.
    normaliser[0] = 0


class Coded(NamedTuple):
    """The digests of a layer: what a choice is told of them, and what a block is sealed with.

    centre [B, Hkv, 1, D], to_keys [B, Hkv, D, r], codes [B, Hkv, capacity, r / 2].
    """

    prepared: choice.Prepared
    centre: Tensor
    to_keys: Tensor
    codes: Tensor


class Step:
    """What compiled code is told of a layer. Everything has to stay where it is, as long as it is used, and all but keys and
    values is held.

    keys, values [B, Hkv, capacity, D]; query [B, Hq, D], scratch memory in fp32; past [B, Hs, 1, N], weights [B, Hs, 4],
    distances [n] and rate as in `attnpred.kernels.stream`; terms: of the estimate of the rest, or None.
    """

    def __init__(
        self, keys: Tensor, values: Tensor, size: int, query: Tensor, scale: float, coded: Coded, past: Tensor,
        weights: Tensor, distances: Tensor, rate: float, terms: RestTerms | None = None,
    ) -> None:  # fmt: skip
        batch, kv_heads, capacity, dim = keys.shape
        heads, rank, per_item = query.shape[1], coded.to_keys.shape[3], max(1, ITEM_TOKENS // size)
        self.estimate = torch.empty(batch * kv_heads * coded.codes.shape[2], dtype=torch.float32, device="cpu")
        at = [
            address(x, torch.float32)
            for x in (query, self.estimate, past, weights, distances, coded.centre, coded.to_keys)
        ]
        asked, estimate, history, weighed, far, centre, to_keys = at
        chosen = np.array(
            (
                0, batch * kv_heads, 1, heads // kv_heads, 0, (heads // kv_heads + 3) // 4, asked, 0, estimate,
                *coded.prepared.told, history, past.shape[3], weighed, *(0,) * 12,
            ),
            np.int64,
        )  # fmt: skip
        attended = item_fields(query, keys, values, None, 0, size, 0, per_item, kv_heads)
        remembered = np.zeros(stream.FIELDS, np.int64)
        remembered[[4, 6, 8, 12]] = past.shape[3], history, weighed, round(rate / stream.RATE_UNIT)
        scales = np.array((scale, 0.0), np.float32)
        left_out = None if terms is None else rest.fields_of(batch * heads, dim, terms)
        self._rest_at = 0 if left_out is None else left_out.ctypes.data
        self._held = query, coded, past, weights, distances, chosen, attended, remembered, scales, terms, left_out
        self.fields = np.array(
            (
                address(keys, *KINDS), address(values, keys.dtype), capacity, KINDS[keys.dtype], size, batch, kv_heads, dim,
                scales.ctypes.data, centre, to_keys, rank, address(coded.codes, torch.int8), coded.codes.shape[2], far,
                distances.numel(), chosen.ctypes.data, attended.ctypes.data, remembered.ctypes.data, asked, per_item,
                *(0,) * 7,
            ),
            np.int64,
        )  # fmt: skip
        assert len(chosen) == choice.FIELDS and len(self.fields) == FIELDS

    def tell(self, selection: Tensor, seen: Tensor, sinks: int, first_recent: int, blocks: int, free: int) -> None:
        """Say of the next token which blocks it may choose, and where selection and block maxima [B, Hs, K] are written."""
        rest_at = self._rest_at if free < first_recent - sinks else 0  # where all are chosen nothing is left out
        at = address(selection, torch.int64), address(seen, torch.float32)
        self.fields[REST:] = rest_at, *at, sinks, first_recent, blocks, free
