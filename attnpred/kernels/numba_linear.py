"""Up to eight vectors times the rows of matrices, by numba (extra `fast`): one call for all matrices that share an input.

At a decode step every weight is read for one row of input, or a few, and nothing else takes that long. How the work is
shared out, and what is rounded, is in `attnpred.kernels.numba_linear_tiles`.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from attnpred.errors import ShapeError
from attnpred.kernels.linear import GROUP, Packed
from attnpred.kernels.numba_linear_tiles import (
    BIAS,
    COLUMN,
    COLUMNS,
    COUNT,
    FIELDS,
    FIRST,
    GROUPS,
    ITEMS,
    OUT,
    OUT_KIND,
    PART,
    PARTS,
    ROWS,
    TILE,
    VECTORS,
    WIDTH,
    X_KIND,
    X,
    do_tiles,
    multiply,
)  # fmt: skip
from attnpred.kernels.numba_tools import address, compiled, threads, widen

MOST = 8
"""Vectors of one call."""
TILE_BYTES = 1 << 15
PAYS = 1 << 17
"""Bytes of matrices from which on it pays to have several threads."""


@compiled("void(int64, int64, int64, int64[::1])")
def _run(parallel: int, count: int, work: int, f: Any) -> None:
    x = np.empty((f[VECTORS], f[WIDTH]), np.float32)
    widen(f[X], f[X_KIND], 0, x)
    multiply(parallel, count, work, f, x)


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
        self._parts, items, column = np.zeros((len(weights), PART), np.int64), 0, 0
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
            part[TILE] = max(4, TILE_BYTES * part[ROWS] // size // 4 * 4)
            part[COLUMN], part[FIRST] = column, items
            column, items = column + part[ROWS], items - (-part[ROWS] // part[TILE])
            self.bytes += size
        self.fields = np.zeros(FIELDS, np.int64)
        self.fields[[WIDTH, GROUPS, X_KIND, COLUMNS]] = self.width, groups, int(dtype == torch.bfloat16), self.columns
        self.fields[OUT_KIND] = self.fields[X_KIND]
        self.fields[[PARTS, COUNT, ITEMS]] = self._parts.ctypes.data, len(weights), items

    def product(self, x: Tensor) -> Tensor:
        """Return x [n, width], contiguous and of `dtype`, n up to `MOST`, times all matrices: [n, all rows together]."""
        if not 1 <= x.shape[0] <= MOST or x.shape[1] != self.width:
            raise ShapeError(
                f"got {x.shape[0]} rows of {x.shape[1]} numbers, expected 1 to {MOST} rows of {self.width}: multiply by torch"
            )
        out = torch.empty(x.shape[0], self.columns, dtype=self.dtype, device="cpu")
        fields = self.fields.copy()
        fields[VECTORS], fields[X], fields[OUT] = x.shape[0], address(x, self.dtype), address(out, self.dtype)
        _run(*threads(self.bytes >= PAYS), do_tiles.address, fields)
        return out
