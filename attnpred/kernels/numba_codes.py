"""The codes of digests and a query, by numba: vectors in LLVM's words, and the pieces of work made of them.

Codes are read once for four queries: 16 bytes of each of four vectors make one register, whose halves are multiplied
with the query in int8 (one instruction for 64 products where the CPU has AVX-512 VNNI, two for 32 with AVX2, widened
products elsewhere).
Their sums, four vectors by four queries, stay side by side: [vector, query] is the layout of everything up to the block.

    round_row     a query in int8, as the products want it
    item          up to VECTORS vectors of one head and four queries, small enough for the first-level cache:
                  logits, their maximum per query, powers of two, sums per block [N, 4]
    finish_row    what each item's maximum is short of the whole head's becomes a factor, and the queries are added up
"""

import math
from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from attnpred.kernels.digest import SMALLEST, STEP

VECTORS = 1024
_LOG2E = 1.4426950408889634
_BYTE, _WORD, _INT = ir.IntType(8), ir.IntType(16), ir.IntType(32)
_BYTES = ir.VectorType(_BYTE, 64)
_INTS, _FLOATS = ir.VectorType(_INT, 16), ir.VectorType(ir.FloatType(), 16)
EXP2 = (1.0, 0.69312105, 0.24022349, 0.05592198, 0.00966637)
"""Chebyshev coefficients of 2 ** x for -0.5 <= x <= 0.5, within 4e-6."""
LOG = (1.000001, -0.50000877, 0.33313563, -0.24920336, 0.20525444, -0.1857384, 0.11657806)
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


def _add_products(builder: Any, features: list[str], total: Any, codes: Any, query: Any) -> Any:
    """Add to `total` <16 x i32> the products of bytes 4i to 4i + 3: codes unsigned, query signed."""
    if "+avx512vnni" in features:
        kind = ir.FunctionType(_INTS, [_INTS] * 3)
        call = cgutils.get_or_insert_function(builder.module, kind, "llvm.x86.avx512.vpdpbusd.512")
        return builder.call(call, [total, builder.bitcast(codes, _INTS), builder.bitcast(query, _INTS)])
    if "+avx2" in features:
        bytes_, words, ints = (ir.VectorType(kind, n) for kind, n in ((_BYTE, 32), (_WORD, 16), (_INT, 8)))
        pairs = cgutils.get_or_insert_function(
            builder.module, ir.FunctionType(words, [bytes_] * 2), "llvm.x86.avx2.pmadd.ub.sw"
        )
        fours = cgutils.get_or_insert_function(
            builder.module, ir.FunctionType(ints, [words] * 2), "llvm.x86.avx2.pmadd.wd"
        )
        halves = []
        for first in (0, 32):
            own = [_shuffle(builder, x, x, list(range(first, first + 32))) for x in (codes, query)]
            halves.append(builder.call(fours, [builder.call(pairs, own), ir.Constant(words, [1] * 16)]))
        return builder.add(total, _shuffle(builder, halves[0], halves[1], list(range(16))))
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
        features = context.codegen().magic_tuple()[2].split(",")
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
                        value = _add_products(builder, features, value, part, operand)
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
            rest, result = builder.fsub(power, whole), _filled(EXP2[-1])
            for coefficient in reversed(EXP2[:-1]):
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
def item(codes: Any, half: int, query: Any, scales: Any, vectors: int, sums: Any, found: Any) -> None:
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
def round_row(query: Any, rounded: Any, scales: Any) -> None:
    """Write query [G, r] in int8 as `_logits` reads it, [quads, pieces, 2, 4, 64], and scales [quads, 16]; both were 0."""
    half = query.shape[1] // 2
    for i in range(query.shape[0]):
        row, quad = query[i], i // 4
        largest = np.float32(1e-20)
        for at in range(row.size):
            largest = max(largest, abs(row[at]))
        for lane in range(i & 3, 16, 4):
            scales[quad, lane] = largest * np.float32(STEP * _LOG2E / 127)
        for at in range(row.size):
            value = np.int8(np.rint(row[at] / largest * np.float32(127)))
            part, byte = (0, at) if at < half else (1, at - half)
            for copy in range(byte & 15, 64, 16):
                rounded[quad, byte >> 4, part, i & 3, copy] = value


@numba.njit(fastmath={"reassoc", "contract"})
def finish_row(sums: Any, found: Any, group: int, step: int, out: Any, bits: Any) -> None:
    """Write to out [N] the logarithms of the attention on blocks; bits is the same memory as integers.

    sums [quads, N, 4] and found [quads, items, 4, 2] are what the items of a row wrote, each for `step` blocks.
    """
    items = (out.size + step - 1) // step
    out[:] = 0
    for quad in range(sums.shape[0]):
        for q in range(4):
            highest, total = found[quad, 0, q, 0], 0.0
            for i in range(items):
                highest = max(highest, found[quad, i, q, 0])
            for i in range(items):
                found[quad, i, q, 0] = math.ldexp(1.0, int(max(found[quad, i, q, 0] - highest, -126.0)))
                total += found[quad, i, q, 0] * found[quad, i, q, 1]
            share = 1 / total if 4 * quad + q < group else 0.0  # no query, no share
            for i in range(items):
                found[quad, i, q, 0] *= share
        for i in range(items):
            one, first = found[quad, i], i * step
            a, b, c, d = one[0, 0], one[1, 0], one[2, 0], one[3, 0]
            for block in range(first, min(first + step, out.size)):
                four = sums[quad, block]
                out[block] += four[0] * a + four[1] * b + four[2] * c + four[3] * d
    exponents = np.empty(out.size, np.float32)
    for i in range(out.size):
        out[i] = max(out[i], np.float32(SMALLEST))
    for i in range(out.size):
        exponent = (bits[i] - np.int32(0x3F3504F3)) >> np.int32(23)  # of a mantissa between the roots of 1/2 and 2
        exponents[i] = exponent
        bits[i] -= exponent << np.int32(23)
    for i in range(out.size):
        x = out[i] - np.float32(1)
        y = np.float32(LOG[6])
        for k in range(5, -1, -1):
            y = y * x + np.float32(LOG[k])
        out[i] = y * x + exponents[i] * np.float32(0.6931471805599453)
