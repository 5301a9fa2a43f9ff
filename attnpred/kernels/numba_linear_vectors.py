"""Rows of a matrix times a few vectors, in LLVM's words: what `attnpred.kernels.numba_linear` is made of.

Packed weights are whole numbers, 32 to a group, and so is the vector here: 16 bits, with a scale for each group. A product
of whole numbers is exact, and one instruction multiplies 16 or 32 of them and adds up pairs (`pmaddwd`), so that a weight
costs less time than it takes to come from memory, on CPUs without instructions for 8-bit products too. Other weights are
widened to fp32.

All arguments of an intrinsic are integers, addresses among them. Rows go four at a time: their numbers come in four streams,
and what is read of the vector serves all of them.
"""

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from attnpred.kernels.numba_vectors import _load, _multiply_add, _prefetch, _splat, _store, _widened

GROUP = 32
AHEAD = 2048
"""Bytes that are asked for before they are needed."""
_FLOAT, _BYTE, _WORD, _INT, _LONG = ir.FloatType(), ir.IntType(8), ir.IntType(16), ir.IntType(32), ir.IntType(64)
_WORDS, _INTS, _FLOATS = ir.VectorType(_WORD, 32), ir.VectorType(_INT, 16), ir.VectorType(_FLOAT, 16)


def _part(builder: Any, vector: Any, first: int, count: int) -> Any:
    order = ir.Constant(ir.VectorType(_INT, count), list(range(first, first + count)))
    return builder.shuffle_vector(vector, vector, order)


def _total(builder: Any, vector: Any) -> Any:
    """Return the sum of a vector's numbers."""
    half = vector.type.count // 2
    while half:
        vector = builder.fadd(_part(builder, vector, 0, half), _part(builder, vector, half, half))
        half //= 2
    return builder.extract_element(vector, _INT(0))


def _paired(context: Any, builder: Any, a: Any, b: Any) -> Any:
    """Return the 16 sums of pairs of the 32 products of two vectors of words."""
    features = context.codegen().magic_tuple()[2].split(",")
    if "+avx512bw" in features:
        kind = ir.FunctionType(_INTS, [_WORDS] * 2)
        call = cgutils.get_or_insert_function(builder.module, kind, "llvm.x86.avx512.pmaddw.d.512")
        return builder.call(call, [a, b])
    if "+avx2" in features:
        kind = ir.FunctionType(ir.VectorType(_INT, 8), [ir.VectorType(_WORD, 16)] * 2)
        call = cgutils.get_or_insert_function(builder.module, kind, "llvm.x86.avx2.pmadd.wd")
        halves = [builder.call(call, [_part(builder, x, i, 16) for x in (a, b)]) for i in (0, 16)]
        return builder.shuffle_vector(*halves, ir.Constant(_INTS, list(range(16))))
    wide = ir.VectorType(_INT, 32)
    products = builder.mul(builder.sext(a, wide), builder.sext(b, wide))
    even, odd = (builder.shuffle_vector(products, products, ir.Constant(_INTS, list(range(i, 32, 2)))) for i in (0, 1))
    return builder.add(even, odd)


def _pieces(builder: Any, bits: int, address: Any) -> list[Any]:
    """Return a group of four rows as four vectors of words: of each row eight numbers."""
    if bits == 8:
        kind = ir.VectorType(_BYTE, 32)
        return [builder.sext(_load(builder, builder.add(address, _LONG(32 * i)), kind), _WORDS) for i in range(4)]
    four = _load(builder, address, _WORDS)
    shifted = [builder.lshr(four, ir.Constant(_WORDS, [4 * i] * 32)) for i in range(4)]
    return [builder.and_(one, ir.Constant(_WORDS, [15] * 32)) for one in shifted[:3]] + shifted[3:]


@intrinsic(prefer_literal=True)
def packed_rows(
    typing: Any, bits: Any, vectors: Any, codes: Any, groups: Any, scales: Any, offsets: Any,
    x: Any, x_scales: Any, x_sums: Any, out: Any,
) -> Any:  # fmt: skip
    """Write to out [vectors, 4 rows] the products of four packed rows.

    codes [groups, 4 rows, 32] in the order of `attnpred.kernels.linear`; scales and offsets (for 4 bits) fp16 [groups, 4];
    x [vectors, groups, 32] words, of each group the scale and the scaled sum in fp32.
    """
    size, count = bits.literal_value, vectors.literal_value

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        _, _, codes, groups, scales, offsets, x, x_scales, x_sums, out = arguments
        fours, eight = ir.VectorType(_FLOAT, 4), ir.VectorType(_WORD, 8)
        totals, added = ([cgutils.alloca_once(builder, kind) for _ in range(count)] for kind in (_FLOATS, fours))
        for place in (*totals, *added):
            builder.store(ir.Constant(place.type.pointee, [0.0] * place.type.pointee.count), place)
        every = ir.Constant(ir.VectorType(_INT, 32), list(range(8)) * 4)
        by_lane = ir.Constant(_INTS, [i // 4 for i in range(16)])
        x_row, x_numbers = builder.mul(groups, _LONG(2 * GROUP)), builder.mul(groups, _LONG(4))
        with cgutils.for_range(builder, groups) as group:
            index = group.index
            at = builder.add(codes, builder.mul(index, _LONG(16 * size)))
            for line in range(0, 16 * size, 64):
                _prefetch(builder, builder.add(at, _LONG(AHEAD + line)))
            pieces = _pieces(builder, size, at)
            given, number = builder.add(x, builder.mul(index, _LONG(2 * GROUP))), builder.mul(index, _LONG(4))
            halves = builder.mul(index, _LONG(8))
            scale = _widened(context, builder, 2, builder.add(scales, halves), 4)
            if size == 4:
                offset = _widened(context, builder, 2, builder.add(offsets, halves), 4)
            for v in range(count):
                start = builder.add(given, builder.mul(x_row, _LONG(v)))
                products = []
                for i, piece in enumerate(pieces):
                    part = _load(builder, builder.add(start, _LONG(16 * i)), eight)
                    products.append(_paired(context, builder, piece, builder.shuffle_vector(part, part, every)))
                sums = builder.add(builder.add(*products[:2]), builder.add(*products[2:]))
                place = builder.add(number, builder.mul(x_numbers, _LONG(v)))
                own = _splat(builder, _load(builder, builder.add(x_scales, place), _FLOAT), 4)
                both = builder.fmul(scale, own)
                wide = builder.shuffle_vector(both, both, by_lane)
                total = _multiply_add(builder, builder.sitofp(sums, _FLOATS), wide, builder.load(totals[v]))
                builder.store(total, totals[v])
                if size == 4:
                    whole = _splat(builder, _load(builder, builder.add(x_sums, place), _FLOAT), 4)
                    builder.store(_multiply_add(builder, offset, whole, builder.load(added[v])), added[v])
        for v in range(count):
            total = builder.load(totals[v])
            quarters = [
                builder.shuffle_vector(total, total, ir.Constant(ir.VectorType(_INT, 4), list(range(i, 16, 4))))
                for i in range(4)
            ]
            found = builder.fadd(builder.fadd(*quarters[:2]), builder.fadd(*quarters[2:]))
            place = builder.add(out, _LONG(16 * v))
            _store(builder, builder.fadd(found, builder.load(added[v])), place)
        return context.get_dummy_value()

    return types.void(bits, vectors, *[types.int64] * 8), generate


@intrinsic(prefer_literal=True)
def plain_rows(typing: Any, kind: Any, vectors: Any, weights: Any, width: Any, x: Any, out: Any) -> Any:
    """Write to out [vectors, 4 rows] the products of weights [4, width], of `kind`, with x [vectors, width] in fp32."""
    stored, count = kind.literal_value, vectors.literal_value

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        _, _, weights, width, x, out = arguments
        each = (4, 2)[stored]
        totals = [[cgutils.alloca_once(builder, _FLOATS) for _ in range(count)] for _ in range(4)]
        for place in (place for row in totals for place in row):
            builder.store(ir.Constant(_FLOATS, [0.0] * 16), place)
        row_bytes, x_row = builder.mul(width, _LONG(each)), builder.mul(width, _LONG(4))
        with cgutils.for_range(builder, builder.udiv(width, _LONG(16))) as chunk:
            at = builder.add(weights, builder.mul(chunk.index, _LONG(16 * each)))
            x_at = builder.add(x, builder.mul(chunk.index, _LONG(64)))
            given = [_load(builder, builder.add(x_at, builder.mul(x_row, _LONG(v))), _FLOATS) for v in range(count)]
            for i in range(4):
                place = builder.add(at, builder.mul(row_bytes, _LONG(i)))
                _prefetch(builder, builder.add(place, builder.mul(row_bytes, _LONG(4))))  # of the next four rows
                weight = _widened(context, builder, stored, place, 16)
                for v in range(count):
                    builder.store(_multiply_add(builder, weight, given[v], builder.load(totals[i][v])), totals[i][v])
        for i in range(4):
            for v in range(count):
                _store(builder, _total(builder, builder.load(totals[i][v])), builder.add(out, _LONG(16 * v + 4 * i)))
        return context.get_dummy_value()

    return types.void(kind, vectors, *[types.int64] * 4), generate
