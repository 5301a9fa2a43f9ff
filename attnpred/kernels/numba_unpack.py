"""Packed rows as numbers again, by numba, on all threads: what a product of many rows with a packed matrix begins with."""

from typing import Any

import numba
import numpy as np
import torch
from torch import Tensor

from attnpred.kernels.linear import GROUP, Packed
from attnpred.kernels.numba_team import share_out
from attnpred.kernels.numba_tools import address, compiled, narrow, pointer, take, threads

TAKEN, BITS, CODES, SCALES, OFFSETS, GROUPS, WIDTH, FOURS, ROWS, OUT, OUT_KIND = range(11)
_FIELDS = 11
_PAYS = 1 << 17
"""Numbers from which on it pays to have several threads."""


@numba.njit
def _half(bits: int) -> float:
    """Return the fp16 number that has those bits, as fp32."""
    size, exponent = bits & 0x3FF, bits >> 10 & 31
    value = (
        np.float32(size) * np.float32(2.0**-24)
        if exponent == 0
        else np.float32(1024 + size) * np.float32(2.0 ** (exponent - 25))
    )
    return -value if bits >> 15 else value


@compiled("void(CPointer(int64))", to_address=True)
def _do_fours(data: Any) -> None:
    """Unpack four rows after the other, until all threads together have done all."""
    f = numba.carray(data, _FIELDS)
    groups, width = f[GROUPS], f[WIDTH]
    row = np.empty((4, groups * GROUP), np.float32)
    while True:
        four = take(f.ctypes.data)
        if four >= f[FOURS]:
            break
        scales = numba.carray(pointer(f[SCALES] + four * groups * 8), (groups, 4), np.uint16)
        if f[BITS] == 8:
            bytes8 = numba.carray(pointer(f[CODES] + four * groups * 128), (groups, 4, 4, 8), np.int8)
            for group in range(groups):
                for r in range(4):
                    scale = _half(np.int64(scales[group, r]))
                    for piece in range(4):
                        at = group * GROUP + piece * 8
                        for i in range(8):
                            row[r, at + i] = np.float32(bytes8[group, piece, r, i]) * scale
        else:
            offsets = numba.carray(pointer(f[OFFSETS] + four * groups * 8), (groups, 4), np.uint16)
            words = numba.carray(pointer(f[CODES] + four * groups * 64), (groups, 4, 8), np.uint16)
            for group in range(groups):
                for r in range(4):
                    scale, offset = _half(np.int64(scales[group, r])), _half(np.int64(offsets[group, r]))
                    for piece in range(4):
                        at, shift = group * GROUP + piece * 8, np.uint16(4 * piece)
                        for i in range(8):
                            code = np.int32(words[group, r, i] >> shift) & np.int32(15)
                            row[r, at + i] = np.float32(code) * scale + offset
        for r in range(min(4, f[ROWS] - 4 * four)):
            first = (4 * four + r) * width
            if f[OUT_KIND]:
                narrow(row[r, :width], f[OUT] + 2 * first)
            else:
                out = numba.carray(pointer(f[OUT] + 4 * first), width, np.float32)
                out[:] = row[r, :width]


@compiled("void(int64, int64, int64, int64[::1])")
def _run(parallel: int, count: int, work: int, f: Any) -> None:
    share_out(parallel, count, work, f.ctypes.data)
    f[TAKEN] = 0


def unpack(packed: Packed, first: int, last: int, out: Tensor) -> None:
    """Write rows `first`, whole fours, up to `last` to out [rows, width] in fp32 or bf16; see `linear.unpack`."""
    fours, groups = -(-(last - first) // 4), packed.scales.shape[1]
    at = first // 4 * groups
    offsets = 0 if packed.offsets is None else address(packed.offsets, torch.float16) + 8 * at
    fields = np.array(
        (
            0, packed.bits, address(packed.codes, torch.int8, torch.int16) + 16 * packed.bits * at,
            address(packed.scales, torch.float16) + 8 * at, offsets, groups, packed.width, fours, last - first,
            address(out, torch.float32, torch.bfloat16), int(out.dtype == torch.bfloat16),
        ),
        np.int64,
    )  # fmt: skip
    _run(*threads((last - first) * packed.width >= _PAYS), _do_fours.address, fields)
