"""Up to eight vectors times the rows of matrices, by numba (extra `fast`): one call for all matrices that share an input.

At a decode step every weight is read for one row of input, or a few, and nothing else takes that long. So a call is made to
read memory in few streams, all cores at once: matrices are cut into tiles of some 32 KiB, which threads take one after the
other (a thread that was held up takes fewer), and what a tile needs of the input lies in the first-level cache.

For packed weights the input is first rounded to 16 bits, 32 numbers to a scale. That changes a product by some 1e-5 of
its size, far less than the packing of the weights. Weights in fp32 and bf16 are read where they are.
"""

from collections.abc import Sequence
from typing import Any

import numba
import numpy as np
import torch
from torch import Tensor

from attnpred.errors import ShapeError
from attnpred.kernels.linear import GROUP, Packed
from attnpred.kernels.numba_linear_vectors import packed_rows, plain_rows
from attnpred.kernels.numba_tools import address, compiled, narrow, pointer, share_out, take, threads, widen

MOST = 8
"""Vectors of one call."""
_TILE = 1 << 15
"""Bytes of a tile."""
_PAYS = 1 << 17
"""Bytes of matrices from which on it pays to have several threads."""

TAKEN, VECTORS, WIDTH, GROUPS, X, X_KIND, OUT, COLUMNS, PARTS, COUNT, ITEMS, GIVEN, X_SCALES, X_SUMS = range(14)
KIND, CODES, SCALES, OFFSETS, BIAS, ROWS, COLUMN, TILE, FIRST = range(9)
"""Of a matrix: what its numbers are (0 fp32, 1 bf16, 8 or 4 bits), where they lie, its place in the output, its tiles."""
_FIELDS, _PART = 14, 9


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
def _do_tiles(data: Any) -> None:
    """Do one tile after the other, until all threads together have done all."""
    f = numba.carray(data, _FIELDS)
    parts = numba.carray(pointer(f[PARTS]), (f[COUNT], _PART), np.int64)
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
            if f[X_KIND]:
                narrow(found[v, : last - first], f[OUT] + 2 * at)
            else:
                out = numba.carray(pointer(f[OUT] + 4 * at), last - first, np.float32)
                out[:] = found[v, : last - first]


@compiled("void(int64, int64, int64, int64[::1])")
def _run(parallel: int, count: int, work: int, f: Any) -> None:
    vectors, width, groups = f[VECTORS], f[WIDTH], f[GROUPS]
    x = np.empty((vectors, width), np.float32)
    widen(f[X], f[X_KIND], 0, x)
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


class Matrices:
    """Matrices of one width that share an input, all packed or all of the type of that input, with their biases.

    Weights and biases must stay where they are, and are held. Raises `ShapeError`: those that are not packed need at least
    four rows, of whole sixteens of numbers.
    """

    def __init__(self, weights: Sequence[Packed | Tensor], biases: Sequence[Tensor | None], dtype: torch.dtype) -> None:
        first = weights[0]
        self.width = first.width if isinstance(first, Packed) else first.shape[1]
        self.dtype, self._held = dtype, (list(weights), list(biases))
        self.rows = [weight.rows if isinstance(weight, Packed) else weight.shape[0] for weight in weights]
        self.columns, self.bytes = sum(self.rows), 0
        groups = -(-self.width // GROUP) if isinstance(first, Packed) else 0
        self._parts, items, column = np.zeros((len(weights), _PART), np.int64), 0, 0
        for part, weight, bias in zip(self._parts, weights, biases, strict=True):
            if isinstance(weight, Packed):
                offsets = 0 if weight.offsets is None else address(weight.offsets, torch.float16)
                part[:4] = (
                    weight.bits,
                    address(weight.codes, torch.int8, torch.int16),
                    address(weight.scales, torch.float16),
                    offsets,
                )
                size, part[ROWS] = weight.bytes(), weight.rows
            else:
                if weight.shape[0] < 4 or self.width % 16:
                    raise ShapeError(
                        f"got a matrix of {weight.shape[0]} rows of {self.width} numbers, expected at least 4 rows "
                        "of whole sixteens: multiply it by torch"
                    )
                part[:4] = int(dtype == torch.bfloat16), address(weight, dtype), 0, 0
                size, part[ROWS] = weight.nbytes, weight.shape[0]
            part[BIAS] = 0 if bias is None else address(bias, dtype)
            part[TILE] = max(4, _TILE * part[ROWS] // size // 4 * 4)
            part[COLUMN], part[FIRST] = column, items
            column, items = column + part[ROWS], items - (-part[ROWS] // part[TILE])
            self.bytes += size
        self._fields = np.zeros(_FIELDS, np.int64)
        self._fields[[WIDTH, GROUPS, X_KIND, COLUMNS]] = self.width, groups, int(dtype == torch.bfloat16), self.columns
        self._fields[[PARTS, COUNT, ITEMS]] = self._parts.ctypes.data, len(weights), items

    def product(self, x: Tensor) -> Tensor:
        """Return x [n, width], contiguous and of `dtype`, n up to `MOST`, times all matrices: [n, all rows together]."""
        if not 1 <= x.shape[0] <= MOST or x.shape[1] != self.width:
            raise ShapeError(
                f"got {x.shape[0]} rows of {x.shape[1]} numbers, expected 1 to {MOST} rows of {self.width}: multiply by torch"
            )
        out = torch.empty(x.shape[0], self.columns, dtype=self.dtype)
        fields = self._fields.copy()
        fields[VECTORS], fields[X], fields[OUT] = x.shape[0], address(x, self.dtype), out.data_ptr()
        _run(*threads(self.bytes >= _PAYS), _do_tiles.address, fields)
        return out
