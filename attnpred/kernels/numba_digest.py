"""`digest_shares` in one pass over the codes, by numba (extra `fast`).

Codes are read once for four queries: 16 bytes of each of four vectors make one register, whose halves are multiplied
with the query in int8 (one instruction for 64 products where the CPU has AVX-512 VNNI, widened products elsewhere).
Their sums, four vectors by four queries, stay side by side: [vector, query] is the layout of everything up to the block.

    item    up to VECTORS vectors of one head and four queries, small enough for the first-level cache:
            logits, their maximum per query, powers of two, sums per block [N, 4]
    then    what each item's maximum is short of the whole head's becomes a factor, and the four queries are added up

Items are shared out over torch's own threads (`attnpred.kernels.numba_tools`). What loops cannot say to LLVM is said in
its own language, `_logits` and `_powers`; these stay in this file because numba recompiles a cached function only when the
file that it stands in has changed. Compiled at first use, in about ten seconds, and kept in the user's cache folder.
"""

import math
from typing import Any

import numba
import numpy as np
import torch
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic
from torch import Tensor

from attnpred.kernels.digest import SMALLEST, STEP, digest_shares_reference
from attnpred.kernels.numba_tools import compiled, pointer, share_out, take, threads

VECTORS = 1024
_PAYS = 1 << 16
"""Bytes of codes from which on it pays to have several threads."""
_LOG2E = 1.4426950408889634
_BYTE, _WORD, _INT = ir.IntType(8), ir.IntType(16), ir.IntType(32)
_BYTES = ir.VectorType(_BYTE, 64)
_INTS, _FLOATS = ir.VectorType(_INT, 16), ir.VectorType(ir.FloatType(), 16)
_EXP2 = (1.0, 0.69312105, 0.24022349, 0.05592198, 0.00966637)
"""Chebyshev coefficients of 2 ** x for -0.5 <= x <= 0.5, within 4e-6."""
_LOG = (1.000001, -0.50000877, 0.33313563, -0.24920336, 0.20525444, -0.1857384, 0.11657806)
"""The same of log(1 + x) / x, for 1 + x between the roots of 1/2 and 2, within 5e-7."""


def _filled(value: float) -> ir.Constant:
    return ir.Constant(_FLOATS, [value] * 16)


def _shuffle(builder: Any, a: Any, b: Any, order: list[int]) -> Any:
    return builder.shuffle_vector(a, b, ir.Constant(ir.VectorType(_INT, len(order)), order))


def _load(builder: Any, address: Any, kind: ir.Type) -> Any:
    return builder.load(builder.inttoptr(address, kind.as_pointer()), align=1)


def _store(builder: Any, value: Any, address: Any) -> None:
    builder.store(value, builder.inttoptr(address, value.type.as_pointer()), align=1)


def _larger(builder: Any, a: Any, b: Any) -> Any:
    return builder.select(builder.fcmp_ordered(">", a, b), a, b)


def _add_products(builder: Any, has_vnni: bool, total: Any, codes: Any, query: Any) -> Any:
    """Add to `total` <16 x i32> the products of bytes 4i to 4i + 3: codes unsigned, query signed."""
    if has_vnni:
        kind = ir.FunctionType(_INTS, [_INTS] * 3)
        call = cgutils.get_or_insert_function(builder.module, kind, "llvm.x86.avx512.vpdpbusd.512")
        return builder.call(call, [total, builder.bitcast(codes, _INTS), builder.bitcast(query, _INTS)])
    words = ir.VectorType(_WORD, 64)
    products = builder.mul(builder.zext(codes, words), builder.sext(query, words))  # at most 15 * 127
    for size in (32, 16):
        even, odd = (_shuffle(builder, products, products, list(range(i, 2 * size, 2))) for i in (0, 1))
        products = builder.add(even, odd)  # at most four times that: still a word
    return builder.add(total, builder.sext(products, _INTS))


def _four_by_four(builder: Any, sums: list[Any]) -> Any:
    """Return [vector, query] sums from four of [vector, 4 parts], one for each query."""
    lanes = range(0, 16, 4)

    def halves(a: Any, b: Any, low: list[int], high: list[int]) -> Any:
        first = _shuffle(builder, a, b, [lane + i for lane in lanes for i in low])
        return builder.add(first, _shuffle(builder, a, b, [lane + i for lane in lanes for i in high]))

    left, right = (halves(a, b, [0, 16, 1, 17], [2, 18, 3, 19]) for a, b in (sums[:2], sums[2:]))
    return halves(left, right, [0, 1, 16, 17], [2, 3, 18, 19])


@intrinsic
def _logits(typing: Any, codes: Any, half: Any, pieces: Any, fours: Any, query: Any, scales: Any, out: Any) -> Any:
    """Write the logits of `fours` times four vectors of `half` bytes; return nothing, out[fours] gets the maxima.

    All arguments are integers, four of them addresses: codes; query [pieces, 2 halves, 4 queries, 64 bytes], zero where
    a piece of 16 bytes is longer than the vector; scales [16]; out [fours + 1, 16].
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        codes, half, pieces, fours, query, scales, out = arguments
        size = half.type
        has_vnni = "+avx512vnni" in context.codegen().magic_tuple()[2].split(",")
        scale = _load(builder, scales, _FLOATS)
        maxima = cgutils.alloca_once_value(builder, _filled(-3e38))
        totals = [cgutils.alloca_once(builder, _INTS) for _ in range(4)]
        with cgutils.for_range(builder, fours) as four:
            first = builder.add(codes, builder.mul(builder.mul(four.index, half), size(4)))
            for total in totals:
                builder.store(_INTS(None), total)
            with cgutils.for_range(builder, pieces) as piece:
                start = builder.add(first, builder.mul(piece.index, size(16)))
                quarter = ir.VectorType(_BYTE, 16)
                parts = [_load(builder, builder.add(start, builder.mul(half, size(i))), quarter) for i in range(4)]
                two = [_shuffle(builder, parts[i], parts[i + 1], list(range(32))) for i in (0, 2)]
                both = _shuffle(builder, two[0], two[1], list(range(64)))
                low = builder.and_(both, ir.Constant(_BYTES, [15] * 64))
                # The high half is kept less 8, as a signed number: plus 8 it is 0 to 15.
                high = builder.lshr(builder.xor(both, ir.Constant(_BYTES, [128] * 64)), ir.Constant(_BYTES, [4] * 64))
                at = builder.add(query, builder.mul(piece.index, size(512)))
                for i, total in enumerate(totals):
                    value = builder.load(total)
                    for part, offset in ((low, 64 * i), (high, 256 + 64 * i)):
                        operand = _load(builder, builder.add(at, size(offset)), _BYTES)
                        value = _add_products(builder, has_vnni, value, part, operand)
                    builder.store(value, total)
            sums = _four_by_four(builder, [builder.load(total) for total in totals])
            found = builder.fmul(builder.sitofp(sums, _FLOATS), scale)
            _store(builder, found, builder.add(out, builder.mul(four.index, size(64))))
            builder.store(_larger(builder, builder.load(maxima), found), maxima)
        _store(builder, builder.load(maxima), builder.add(out, builder.mul(fours, size(64))))
        return context.get_dummy_value()

    return types.void(*[types.int64] * 7), generate


@intrinsic
def _powers(typing: Any, values: Any, fours: Any, maxima: Any, vectors: Any, blocks: Any, out: Any) -> Any:
    """Replace values [fours, 16] by 2 ** (value - maximum); write sums per block to out [blocks, 4], of all to maxima [4].

    All arguments are integers, three of them addresses: values, maxima [16] and out.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        values, fours, maxima, vectors, blocks, out = arguments
        size, query = fours.type, ir.VectorType(ir.FloatType(), 4)
        highest = _load(builder, maxima, _FLOATS)
        whole_part = cgutils.get_or_insert_function(
            builder.module, ir.FunctionType(_FLOATS, [_FLOATS]), "llvm.floor.v16f32"
        )
        with cgutils.for_range(builder, fours) as four:
            at = builder.add(values, builder.mul(four.index, size(64)))
            power = builder.fsub(_load(builder, at, _FLOATS), highest)
            power = _larger(builder, power, _filled(-126.0))  # nothing below the smallest normal number
            whole = builder.call(whole_part, [builder.fadd(power, _filled(0.5))])
            rest, result = builder.fsub(power, whole), _filled(_EXP2[-1])
            for coefficient in reversed(_EXP2[:-1]):
                result = builder.fmul(result, rest, flags=["contract"])
                result = builder.fadd(result, _filled(coefficient), flags=["contract"])
            exponent = builder.add(builder.fptosi(whole, _INTS), ir.Constant(_INTS, [127] * 16))
            exponent = builder.bitcast(builder.shl(exponent, ir.Constant(_INTS, [23] * 16)), _FLOATS)
            _store(builder, builder.fmul(result, exponent), at)
        row = builder.mul(vectors, size(16))
        every, total = cgutils.alloca_once_value(builder, query(None)), cgutils.alloca_once(builder, query)
        with cgutils.for_range(builder, blocks) as block:
            start = builder.add(values, builder.mul(block.index, row))
            builder.store(query(None), total)
            with cgutils.for_range(builder, vectors) as vector:
                found = _load(builder, builder.add(start, builder.mul(vector.index, size(16))), query)
                builder.store(builder.fadd(builder.load(total), found), total)
            _store(builder, builder.load(total), builder.add(out, builder.mul(block.index, size(16))))
            builder.store(builder.fadd(builder.load(every), builder.load(total)), every)
        _store(builder, builder.load(every), maxima)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 6), generate


@numba.njit(fastmath={"reassoc", "contract"})
def _item(codes: Any, half: int, query: Any, scales: Any, vectors: int, sums: Any, found: Any) -> None:
    """For codes [bytes] and four queries write sums [blocks, 4] in units of 2 ** maximum; found [4, 2]: maximum, total."""
    pieces, count = query.shape[0], codes.size // half
    fours = (count + 3) // 4
    values = np.empty((fours + 1, 16), np.float32)
    # Where the last bytes read would lie past the end, four vectors are copied first.
    safe = max(0, min(count // 4, (codes.size - 16 * pieces - 3 * half) // (4 * half) + 1))
    _logits(codes.ctypes.data, half, pieces, safe, query.ctypes.data, scales.ctypes.data, values.ctypes.data)
    highest = values[safe].copy()
    copied = np.zeros((4, 16 * pieces), np.int8)
    for four in range(safe, fours):
        for i in range(4):
            vector = min(4 * four + i, count - 1)  # the last one again: no maximum changes
            for byte in range(half):
                copied[i, byte] = codes[vector * half + byte]
        at = values[four:].ctypes.data
        _logits(copied.ctypes.data, 16 * pieces, pieces, 1, query.ctypes.data, scales.ctypes.data, at)
        for i in range(16):
            highest[i] = max(highest[i], values[four + 1, i])
    found[:, 0] = -3e38
    for i in range(16):  # whole, so that sums of different units are compared exactly
        found[i % 4, 0] = max(found[i % 4, 0], np.ceil(highest[i]))
    for i in range(16):
        highest[i] = found[i % 4, 0]
    _powers(values.ctypes.data, fours, highest.ctypes.data, vectors, count // vectors, sums.ctypes.data)
    for i in range(4):
        found[i, 1] = highest[i]


@numba.njit
def _rounded(query: Any, quads: int) -> Any:
    """Return query [X, G, r] in int8 as `_logits` reads it, [X * quads, pieces, 2, 4, 64], and its scales [..., 16]."""
    heads, group, half = query.shape[0], query.shape[1], query.shape[2] // 2
    out = np.zeros((heads * quads, (half + 15) // 16, 2, 4, 64), np.int8)
    scales = np.zeros((heads * quads, 16), np.float32)
    for head in range(heads):
        for i in range(group):
            row, own = query[head, i], head * quads + i // 4
            largest = np.float32(1e-20)
            for at in range(row.size):
                largest = max(largest, abs(row[at]))
            for lane in range(i & 3, 16, 4):
                scales[own, lane] = largest * np.float32(STEP * _LOG2E / 127)
            for at in range(row.size):
                value = np.int8(np.rint(row[at] / largest * np.float32(127)))
                part, byte = (0, at) if at < half else (1, at - half)
                for copy in range(byte & 15, 64, 16):
                    out[own, byte >> 4, part, i & 3, copy] = value
    return out, scales


@numba.njit
def _factors(found: Any, quads: int, group: int) -> None:
    """Replace the maximum of each item in found [X * quads, items, 4, 2] by what its sums are to be multiplied with."""
    for i in range(found.shape[0]):
        for q in range(4):
            highest, total = found[i, 0, q, 0], 0.0
            for one in found[i]:
                highest = max(highest, one[q, 0])
            for one in found[i]:
                one[q, 0] = math.ldexp(1.0, int(max(one[q, 0] - highest, -126.0)))
                total += one[q, 0] * one[q, 1]
            share = 1 / total if 4 * (i % quads) + q < group else 0.0  # no query, no share
            for one in found[i]:
                one[q, 0] *= share


@numba.njit(fastmath={"reassoc", "contract"})
def _add_up(sums: Any, found: Any, out: Any) -> None:
    """Add to out [blocks] four queries' sums [blocks, 4], each with its factor in found [4, 2]."""
    a, b, c, d = found[0, 0], found[1, 0], found[2, 0], found[3, 0]
    for block in range(out.size):
        out[block] += sums[block, 0] * a + sums[block, 1] * b + sums[block, 2] * c + sums[block, 3] * d


@numba.njit(fastmath={"contract"})
def _to_logarithms(values: Any, bits: Any) -> None:
    """Replace values [n], of which bits are the same memory as integers, by their logarithms."""
    exponents = np.empty(values.size, np.float32)
    for i in range(values.size):
        values[i] = max(values[i], np.float32(SMALLEST))
    for i in range(values.size):
        exponent = (bits[i] - np.int32(0x3F3504F3)) >> np.int32(23)  # of a mantissa between the roots of 1/2 and 2
        exponents[i] = exponent
        bits[i] -= exponent << np.int32(23)
    for i in range(values.size):
        x = values[i] - np.float32(1)
        y = np.float32(_LOG[6])
        for k in range(5, -1, -1):
            y = y * x + np.float32(_LOG[k])
        values[i] = y * x + exponents[i] * np.float32(0.6931471805599453)


# What the threads are told: an array of integers, of which the first counts the items that were taken.
_FIELDS = 14


@numba.njit
def _tables(fields: Any) -> Any:
    """Return the tables that both kinds of items work on: sums [X * quads, N, 4] and found [X * quads, pieces, 4, 2]."""
    rows, pieces, blocks = fields[1], fields[2], fields[3]
    sums = numba.carray(pointer(fields[7]), (rows, blocks, 4), np.float32)
    return sums, numba.carray(pointer(fields[8]), (rows, pieces, 4, 2), np.float32)


@compiled("void(CPointer(int64))", to_address=True)
def _sum_items(data: Any) -> None:
    """Do `_item` for one item after the other, until all threads together have done all."""
    fields = numba.carray(data, _FIELDS)
    rows, pieces, blocks, step, quads, vectors = fields[1], fields[2], fields[3], fields[4], fields[5], fields[6]
    half = fields[13]
    sums, found = _tables(fields)
    rounded = numba.carray(pointer(fields[9]), (rows, (half + 15) // 16, 2, 4, 64), np.int8)
    scales = numba.carray(pointer(fields[10]), (rows, 16), np.float32)
    while True:
        item = take(fields.ctypes.data)
        if item >= rows * pieces:
            break
        i, first = item // pieces, item % pieces * step
        last = min(first + step, blocks)
        start = fields[11] + i // quads * fields[12] + first * vectors * half
        codes = numba.carray(pointer(start), (last - first) * vectors * half, np.int8)
        _item(codes, half, rounded[i], scales[i], vectors, sums[i, first:last], found[i, item % pieces])


@compiled("void(CPointer(int64))", to_address=True)
def _add_items(data: Any) -> None:
    """Add up the queries of one item after the other, until all threads together have done all."""
    fields = numba.carray(data, _FIELDS)
    rows, pieces, blocks, step, quads = fields[1], fields[2], fields[3], fields[4], fields[5]
    sums, found = _tables(fields)
    values = numba.carray(pointer(fields[9]), (rows // quads, blocks), np.float32)
    bits = numba.carray(pointer(fields[9]), (rows // quads, blocks), np.int32)
    while True:
        item = take(fields.ctypes.data)
        if item >= rows // quads * pieces:
            break
        head, piece = item // pieces, item % pieces
        first, last = piece * step, min(piece * step + step, blocks)
        values[head, first:last] = 0
        for i in range(head * quads, (head + 1) * quads):
            _add_up(sums[i, first:last], found[i, piece], values[head, first:last])
        _to_logarithms(values[head, first:last], bits[head, first:last])


@compiled("void(int64, int64, int64, int64, int8[:, :], float32[:, :, ::1], int64, float32[:, ::1])")
def _shares(
    parallel: int, count: int, sum_items: int, add_items: int, codes: Any, query: Any, vectors: int, out: Any
) -> None:
    """Write to out [X, N] the logarithm of the attention on each block; codes [X, bytes], query [X, G, r]."""
    heads, group, rank = query.shape
    blocks, quads, step = out.shape[1], (group + 3) // 4, max(1, VECTORS // vectors)
    rows, pieces = heads * quads, (blocks + step - 1) // step
    rounded, scales = _rounded(query, quads)
    sums = np.empty((rows, blocks, 4), np.float32)
    found = np.empty((rows, pieces, 4, 2), np.float32)
    fields = np.empty(_FIELDS, np.int64)
    fields[:7] = (0, rows, pieces, blocks, step, quads, vectors)
    fields[7], fields[8], fields[9], fields[10] = (
        sums.ctypes.data,
        found.ctypes.data,
        rounded.ctypes.data,
        scales.ctypes.data,
    )
    fields[11], fields[12], fields[13] = codes.ctypes.data, codes.strides[0], rank // 2
    share_out(parallel, count, sum_items, fields.ctypes.data)
    _factors(found, quads, group)
    fields[0], fields[9] = 0, out.ctypes.data
    share_out(parallel, count, add_items, fields.ctypes.data)
    # Numba frees an array after its last use that it sees; what the threads read it does not see.
    rounded[0, 0, 0, 0, 0] = scales[0, 0] = sums[0, 0, 0] = found[0, 0, 0, 0] = fields[0] = 0


def digest_shares(query: Tensor, codes: Tensor, vectors: int) -> Tensor:
    """Same as `attnpred.kernels.digest.digest_shares`."""
    if codes.device.type != "cpu":
        return digest_shares_reference(query, codes, vectors)
    out = torch.empty(codes.shape[0], codes.shape[1] // vectors)
    if out.numel():
        rows, queries = codes.flatten(1), query.float().contiguous()
        rows = rows if rows.stride(1) == 1 else rows.contiguous()
        work = _sum_items.address, _add_items.address
        _shares(*threads(rows.numel() >= _PAYS), *work, rows.numpy(), queries.numpy(), vectors, out.numpy())
    return out
