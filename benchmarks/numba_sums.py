"""Reading memory as fast as it goes: sums of 64-bit words, on all threads (`benchmarks.limits`)."""

from typing import Any

import numba
import numpy as np
import torch
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic
from torch import Tensor

from attnpred.kernels.numba_tools import compiled, fork, pointer, take, threads

TAKEN, WORDS, PLACES, COUNT, WORDS_PER_PIECE, AT_ONCE, SUM = range(7)
AHEAD = 4
"""Blocks that are asked for ahead of the one that is read."""


@intrinsic
def prefetch(typing: Any, address: Any, count: Any) -> Any:
    """Ask for `count` bytes at `address`."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        address, count = arguments
        byte, number, long = ir.IntType(8).as_pointer(), ir.IntType(32), ir.IntType(64)
        kind = ir.FunctionType(ir.VoidType(), [byte, number, number, number])
        call = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0i8")
        with cgutils.for_range(builder, builder.udiv(count, long(64))) as line:
            at = builder.inttoptr(builder.add(address, builder.mul(line.index, long(64))), byte)
            builder.call(call, [at, number(0), number(3), number(1)])
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), generate


@intrinsic
def add(typing: Any, address: Any, value: Any) -> Any:
    """Add to the integer at `address`, which other threads add to as well."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        at = builder.inttoptr(arguments[0], ir.IntType(64).as_pointer())
        builder.atomic_rmw("add", at, arguments[1], "monotonic")
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), generate


@numba.njit
def _sum(address: int, count: int) -> int:
    words = numba.carray(pointer(address), count, np.int64)
    total = 0
    for i in range(count):
        total += words[i]
    return total


@compiled("void(CPointer(int64))", to_address=True)
def _pieces(data: Any) -> None:
    """Read some pieces after the other, until all threads together have read all."""
    fields = numba.carray(data, 7)
    count, size, at_once = fields[COUNT], fields[WORDS_PER_PIECE] * 8, fields[AT_ONCE]
    total = 0
    while True:
        first = take(fields.ctypes.data) * at_once
        if first >= count:
            break
        last = min(first + at_once, count)
        if fields[PLACES]:
            places = numba.carray(pointer(fields[PLACES]), count, np.int64)
            for i in range(first, min(first + AHEAD, last)):
                prefetch(fields[WORDS] + places[i] * size, size)
            for i in range(first, last):
                if i + AHEAD < last:
                    prefetch(fields[WORDS] + places[i + AHEAD] * size, size)
                total += _sum(fields[WORDS] + places[i] * size, size // 8)
        else:
            for i in range(first, last):
                total += _sum(fields[WORDS] + i * size, size // 8)
    add(fields.ctypes.data + 8 * SUM, total)


@compiled("void(int64, int64, int64, int64[::1])")
def _read(parallel: int, count: int, work: int, fields: Any) -> None:
    fork(parallel, count, work, fields.ctypes.data)
    fields[TAKEN] = 0


def read(words: Tensor, places: Tensor | None, piece: int) -> int:
    """Return the sum of all `words` [n], whole pieces of `piece` bytes, or of those at `places`."""
    count = words.numel() * 8 // piece if places is None else places.numel()
    address = 0 if places is None else places.data_ptr()
    fields = torch.tensor([0, words.data_ptr(), address, count, piece // 8, 1 if places is None else 64, 0])
    _read(*threads(), _pieces.address, fields.numpy())
    return int(fields[SUM])
