"""Matrices in tiles: what `attnpred.kernels.numba_linear` multiplies, and how the work is shared out.

A product reads memory in few streams, all cores at once: matrices are cut into tiles of some 32 KiB, which threads take one
after the other (a thread that was held up takes fewer), and what a tile needs of the input lies in the first-level cache.

For packed weights the input is first rounded to 16 bits, 32 numbers to a scale. That changes a product by some 1e-5 of
its size, far less than the packing of the weights. Weights in fp32 and bf16 are read where they are.
"""

from typing import Any

import numba
import numpy as np

from attnpred.kernels.linear import GROUP
from attnpred.kernels.numba_linear_vectors import packed_rows, plain_rows
from attnpred.kernels.numba_team import share_out
from attnpred.kernels.numba_tools import compiled, narrow, pointer, take, widen

TAKEN, VECTORS, WIDTH, GROUPS, X, X_KIND, OUT, COLUMNS, PARTS, COUNT, ITEMS, GIVEN, X_SCALES, X_SUMS, OUT_KIND = range(
    15
)
KIND, CODES, SCALES, OFFSETS, BIAS, ROWS, COLUMN, TILE, FIRST = range(9)
"""Of a matrix: what its numbers are (0 fp32, 1 bf16, 8 or 4 bits), where they lie, its place in the output, its tiles."""
FIELDS, PART = 15, 9


@numba.njit(fastmath={"reassoc", "contract", "nsz"})
def _round(x: Any, given: Any, scale: Any, sums: Any) -> None:
    """Write x [n] to given [groups * 32] in 16 bits, and for each group its scale, and its sum."""
    for group in range((x.size + GROUP - 1) // GROUP):
        first = group * GROUP
        last = min(first + GROUP, x.size)
        largest = endless = np.float32(0)
        for i in range(first, last):
            largest = max(largest, abs(x[i]))
            endless += x[i] * np.float32(0)  # not a number where one of them is none, or infinite
        factor = np.float32(32767) / largest if largest > np.float32(1e-30) else np.float32(0)
        total = np.int32(0)
        for i in range(first, last):
            number = np.int16(np.rint(x[i] * factor))
            given[i] = number
            total += np.int32(number)
        scale[group] = largest / np.float32(32767) + endless
        sums[group] = np.float32(total) * scale[group]


@numba.njit
def _four_rows(f: Any, part: Any, row: int, done: int, count: int, out: int) -> None:
    """Write to out [count, 4] the products of four rows with `count` vectors, 4 or 1, after the `done` first ones."""
    kind, groups, width = part[KIND], f[GROUPS], f[WIDTH]
    if kind > 1:
        at = row // 4 * groups
        codes, scales, offsets = part[CODES] + at * 16 * kind, part[SCALES] + at * 8, part[OFFSETS] + at * 8
        x, own = f[GIVEN] + done * groups * GROUP * 2, done * groups * 4
        x_scales, x_sums = f[X_SCALES] + own, f[X_SUMS] + own
        if kind == 8:
            if count == 1:
                packed_rows(8, 1, codes, groups, scales, offsets, x, x_scales, x_sums, out)
            else:
                packed_rows(8, 4, codes, groups, scales, offsets, x, x_scales, x_sums, out)
        elif count == 1:
            packed_rows(4, 1, codes, groups, scales, offsets, x, x_scales, x_sums, out)
        else:
            packed_rows(4, 4, codes, groups, scales, offsets, x, x_scales, x_sums, out)
        return
    weights, given = part[CODES] + row * width * (4 - 2 * kind), f[GIVEN] + done * width * 4
    if kind == 0:
        if count == 1:
            plain_rows(0, 1, weights, width, given, out)
        else:
            plain_rows(0, 4, weights, width, given, out)
    elif count == 1:
        plain_rows(1, 1, weights, width, given, out)
    else:
        plain_rows(1, 4, weights, width, given, out)


@numba.njit
def _tile(f: Any, part: Any, first: int, last: int, found: Any) -> None:
    """Write to found [vectors, rows of a tile] the products of rows `first`, whole fours, up to `last`."""
    four = np.empty((4, 4), np.float32)
    for row in range(first, last, 4):
        start = row if part[KIND] > 1 else min(row, last - 4)  # packed rows are padded; of others some come twice
        done = 0
        while done < f[VECTORS]:
            count = 4 if f[VECTORS] - done >= 4 else 1
            _four_rows(f, part, start, done, count, four.ctypes.data)
            for v in range(count):
                for i in range(row - start, min(4, last - start)):
                    found[done + v, start + i - first] = four[v, i]
            done += count


@compiled("void(CPointer(int64))", to_address=True)
def do_tiles(data: Any) -> None:
    """Do one tile after the other, until all threads together have done all."""
    f = numba.carray(data, FIELDS)
    parts = numba.carray(pointer(f[PARTS]), (f[COUNT], PART), np.int64)
    most = 0
    for number in range(f[COUNT]):
        most = max(most, parts[number, TILE])
    found = np.empty((f[VECTORS], most), np.float32)
    while True:
        item, number = take(f.ctypes.data), 0
        if item >= f[ITEMS]:
            break
        while number + 1 < f[COUNT] and item >= parts[number + 1, FIRST]:
            number += 1
        part = parts[number]
        first = (item - part[FIRST]) * part[TILE]
        last = min(first + part[TILE], part[ROWS])
        _tile(f, part, first, last, found)
        if part[BIAS]:
            bias = np.empty(last - first, np.float32)
            widen(part[BIAS], f[X_KIND], first, bias)
            for v in range(f[VECTORS]):
                for i in range(last - first):
                    found[v, i] += bias[i]
        for v in range(f[VECTORS]):
            at = v * f[COLUMNS] + part[COLUMN] + first
            if f[OUT_KIND]:
                narrow(found[v, : last - first], f[OUT] + 2 * at)
            else:
                out = numba.carray(pointer(f[OUT] + 4 * at), last - first, np.float32)
                out[:] = found[v, : last - first]


@numba.njit
def multiply(parallel: int, count: int, work: int, f: Any, x: Any) -> None:
    """Multiply x [vectors, width], fp32, with all matrices of `f`; parallel, count, work: see `share_out`."""
    vectors, groups = f[VECTORS], f[GROUPS]
    given = np.zeros((vectors, groups * GROUP), np.int16)
    scales, sums = np.empty((vectors, groups), np.float32), np.empty((vectors, groups), np.float32)
    if groups:
        for v in range(vectors):
            _round(x[v], given[v], scales[v], sums[v])
        f[GIVEN], f[X_SCALES], f[X_SUMS] = given.ctypes.data, scales.ctypes.data, sums.ctypes.data
    else:
        f[GIVEN] = x.ctypes.data
    f[TAKEN] = 0
    share_out(parallel, count, work, f.ctypes.data)
    # Numba frees an array after its last use that it sees; what the threads read it does not see.
    x[0, 0] = f[TAKEN] = 0
    if groups:
        given[0, 0] = scales[0, 0] = sums[0, 0] = 0
