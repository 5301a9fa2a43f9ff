"""Vectors of sixteen numbers in LLVM's own words: what loops in Python cannot say to it.

Keys and values are read as they are stored and widened to fp32 in registers: numba knows no bf16, and widening by hand is
one shift. All arguments of an intrinsic are integers, addresses among them; the first says what numbers are stored (0 fp32,
1 bf16, 2 fp16). LLVM splits the vectors where a CPU's are shorter.
"""

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

_FLOAT, _WORD, _INT, _LONG = ir.FloatType(), ir.IntType(16), ir.IntType(32), ir.IntType(64)
_BYTES_OF = (4, 2, 2)
NONE = -3.0e38
"""Smaller than any logit."""
_EXP2 = (1.0, 0.6931471805, 0.2402265069, 0.0555041087, 0.0096181291, 0.0013333558, 0.00015403530)
"""ln(2) ** k / k!: 2 ** x for -0.5 <= x <= 0.5, within 2e-7."""


def _load(builder: Any, address: Any, kind: Any) -> Any:
    return builder.load(builder.inttoptr(address, kind.as_pointer()), align=1)


def _store(builder: Any, value: Any, address: Any) -> None:
    builder.store(value, builder.inttoptr(address, value.type.as_pointer()), align=1)


def _widened(context: Any, builder: Any, kind: int, address: Any, lanes: int) -> Any:
    """Load `lanes` stored numbers as fp32."""
    floats, longs = ir.VectorType(_FLOAT, lanes), ir.VectorType(_INT, lanes)
    if kind == 0:
        return _load(builder, address, floats)
    if kind == 2 and "+f16c" in context.codegen().magic_tuple()[2].split(","):
        return builder.fpext(_load(builder, address, ir.VectorType(ir.HalfType(), lanes)), floats)
    words = builder.zext(_load(builder, address, ir.VectorType(_WORD, lanes)), longs)

    def constant(value: int) -> Any:
        return ir.Constant(longs, [value] * lanes)

    if kind == 1:
        return builder.bitcast(builder.shl(words, constant(16)), floats)
    # LLVM would call a function that nobody has. The exponent of fp16 is 112 short of that of fp32, small numbers too.
    size = builder.and_(words, constant(0x7FFF))
    moved = builder.bitcast(builder.shl(size, constant(13)), floats)
    scaled = builder.bitcast(builder.fmul(moved, ir.Constant(floats, [2.0**112] * lanes)), longs)
    endless = builder.icmp_unsigned(">=", size, constant(0x7C00))  # infinite, or not a number
    found = builder.select(endless, builder.or_(scaled, constant(0x7F800000)), scaled)
    sign = builder.shl(builder.and_(words, constant(0x8000)), constant(16))
    return builder.bitcast(builder.or_(found, sign), floats)


def _multiply_add(builder: Any, a: Any, b: Any, c: Any) -> Any:
    """Return a * b + c, in one rounding where the CPU can."""
    kind = ir.FunctionType(a.type, [a.type] * 3)
    name = f"llvm.fmuladd.v{a.type.count}f32"
    return builder.call(cgutils.get_or_insert_function(builder.module, kind, name), [a, b, c])


def _prefetch(builder: Any, address: Any) -> None:
    """Begin to load the 64 bytes at `address`."""
    byte = ir.IntType(8).as_pointer()
    kind = ir.FunctionType(ir.VoidType(), [byte, _INT, _INT, _INT])
    call = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0i8")
    builder.call(call, [builder.inttoptr(address, byte), _INT(0), _INT(3), _INT(1)])


def _splat(builder: Any, value: Any, lanes: int) -> Any:
    kind = ir.VectorType(_FLOAT, lanes)
    one = builder.insert_element(ir.Constant(kind, ir.Undefined), value, ir.Constant(_INT, 0))
    return builder.shuffle_vector(
        one, ir.Constant(kind, ir.Undefined), ir.Constant(ir.VectorType(_INT, lanes), [0] * lanes)
    )


def _sums(builder: Any, vectors: list[Any]) -> Any:
    """Return the sums of 16 vectors of 16, in their order; a shuffle is one instruction where a register holds 64 bytes."""

    def joined(vectors: list[Any], low: list[int], high: list[int]) -> list[Any]:
        """Add two shuffles of every two vectors, so that each of the two keeps half as many parts of its sum."""
        first, second = (ir.Constant(ir.VectorType(_INT, 16), order) for order in (low, high))
        return [
            builder.fadd(builder.shuffle_vector(a, b, first), builder.shuffle_vector(a, b, second))
            for a, b in zip(vectors[::2], vectors[1::2], strict=True)
        ]

    def quarters(order: list[int]) -> list[int]:
        return [4 * (i % 4) + i // 4 * 16 + k for i in order for k in range(4)]

    lanes = range(0, 16, 4)
    vectors = joined(vectors, *([at + i for at in lanes for i in order] for order in ((0, 16, 1, 17), (2, 18, 3, 19))))
    vectors = joined(vectors, *([at + i for at in lanes for i in order] for order in ((0, 1, 16, 17), (2, 3, 18, 19))))
    vectors = joined(vectors, quarters([0, 1, 4, 5]), quarters([2, 3, 6, 7]))
    return joined(vectors, quarters([0, 2, 4, 6]), quarters([1, 3, 5, 7]))[0]


def _sums_of_eight(builder: Any, vectors: list[Any]) -> Any:
    """Return the sums of 8 vectors of 8, in their order, for registers of 32 bytes."""
    even, odd = [0, 2, 8, 10, 4, 6, 12, 14], [1, 3, 9, 11, 5, 7, 13, 15]
    for low, high in ((even, odd), (even, odd), ([0, 1, 2, 3, 8, 9, 10, 11], [4, 5, 6, 7, 12, 13, 14, 15])):
        first, second = (ir.Constant(ir.VectorType(_INT, 8), order) for order in (low, high))
        vectors = [
            builder.fadd(builder.shuffle_vector(a, b, first), builder.shuffle_vector(a, b, second))
            for a, b in zip(vectors[::2], vectors[1::2], strict=True)
        ]
    return vectors[0]


def _has_wide_registers(context: Any) -> bool:
    """Return whether a register holds 16 numbers, and there are 32 of them; else they are 16 of 8 numbers."""
    return "+avx512f" in context.codegen().magic_tuple()[2].split(",")


def _larger(builder: Any, a: Any, b: Any) -> Any:
    return builder.select(builder.fcmp_ordered(">", a, b), a, b)


def _folded(builder: Any, vector: Any, join: Any) -> Any:
    """Return the 4 numbers of a vector [4, 4] that is joined over its first dimension."""
    for half in (8, 4):
        low, high = (ir.Constant(ir.VectorType(_INT, half), list(range(i, i + half))) for i in (0, half))
        vector = join(
            builder, builder.shuffle_vector(vector, vector, low), builder.shuffle_vector(vector, vector, high)
        )
    return vector


def _power_of_two(builder: Any, x: Any) -> Any:
    """Return 2 ** x of a vector of numbers up to 0; 0 below -126."""
    floats, longs = x.type, ir.VectorType(_INT, x.type.count)
    constant = [ir.Constant(floats, [value] * floats.count) for value in (*_EXP2, -126.0, 0.0)]
    too_small = builder.fcmp_ordered("<", x, constant[-2])  # false for what is not a number, which stays that
    x = builder.select(too_small, constant[-2], x)
    kind = ir.FunctionType(floats, [floats])
    rint = cgutils.get_or_insert_function(builder.module, kind, f"llvm.rint.v{floats.count}f32")
    whole = builder.call(rint, [x])
    rest = builder.fsub(x, whole)
    y = constant[6]
    for k in range(5, -1, -1):
        y = _multiply_add(builder, y, rest, constant[k])
    shift = builder.shl(builder.fptosi(whole, longs), ir.Constant(longs, [23] * floats.count))
    y = builder.bitcast(builder.add(builder.bitcast(y, longs), shift), floats)
    return builder.select(too_small, constant[-1], y)


@intrinsic(prefer_literal=True)
def dots(typing: Any, kind: Any, keys: Any, dim: Any, fours: Any, query: Any, out: Any, top: Any, ahead: Any) -> Any:
    """Write to out [fours, 4 keys, 4 queries] the products of keys [fours * 4, dim] with query [4, dim] in fp32.

    top [4] gets the largest of each query. ahead: as many bytes as the keys have, that are to be loaded meanwhile.
    """
    stored = kind.literal_value

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        _, keys, dim, fours, query, out, top, ahead = arguments
        floats, size = ir.VectorType(_FLOAT, 16), _LONG
        highest = cgutils.alloca_once_value(builder, ir.Constant(floats, [NONE] * 16))
        # Sums have to fit in registers: 4 keys by 4 queries, or one pass for two queries each.
        is_wide = _has_wide_registers(context)
        lanes, at_once = (16, 4) if is_wide else (8, 2)
        lane_floats = ir.VectorType(_FLOAT, lanes)
        totals = [cgutils.alloca_once(builder, lane_floats) for _ in range(4 * at_once)]
        key_row, query_row = builder.mul(dim, size(_BYTES_OF[stored])), builder.mul(dim, size(4))
        chunks = builder.udiv(dim, size(lanes))

        def products(first: Any, queries_at: Any) -> Any:
            """Return the products of four keys with `at_once` queries."""
            for total in totals:
                builder.store(ir.Constant(lane_floats, [0.0] * lanes), total)
            with cgutils.for_range(builder, chunks) as chunk:
                at = builder.add(first, builder.mul(chunk.index, size(lanes * _BYTES_OF[stored])))
                asked = builder.add(queries_at, builder.mul(chunk.index, size(4 * lanes)))
                queries = [
                    _load(builder, builder.add(asked, builder.mul(query_row, size(i))), lane_floats)
                    for i in range(at_once)
                ]
                for i in range(4):
                    key = _widened(context, builder, stored, builder.add(at, builder.mul(key_row, size(i))), lanes)
                    for q in range(at_once):
                        total = totals[at_once * i + q]
                        builder.store(_multiply_add(builder, key, queries[q], builder.load(total)), total)
            return (_sums if is_wide else _sums_of_eight)(builder, [builder.load(total) for total in totals])

        with cgutils.for_range(builder, fours) as four:
            first = builder.add(keys, builder.mul(builder.mul(four.index, size(4)), key_row))
            offset = builder.mul(builder.mul(four.index, size(4)), key_row)
            with cgutils.for_range(builder, builder.udiv(key_row, size(16))) as line:
                _prefetch(builder, builder.add(ahead, builder.add(offset, builder.mul(line.index, size(64)))))
            found = products(first, query)
            if not is_wide:
                others = products(first, builder.add(query, builder.mul(query_row, size(2))))
                order = [2 * key + q + half for key in range(4) for half in (0, 8) for q in (0, 1)]
                found = builder.shuffle_vector(found, others, ir.Constant(ir.VectorType(_INT, 16), order))
            _store(builder, found, builder.add(out, builder.mul(four.index, size(64))))
            builder.store(_larger(builder, builder.load(highest), found), highest)
        _store(builder, _folded(builder, builder.load(highest), _larger), top)
        return context.get_dummy_value()

    return types.void(kind, *[types.int64] * 7), generate


@intrinsic
def powers(typing: Any, logits: Any, fours: Any, top: Any, total: Any) -> Any:
    """Replace logits [fours, 4, 4 queries] by 2 ** (logit - top [4]), none of them above 1; total [4] gets their sums."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        logits, fours, top, total = arguments
        floats = ir.VectorType(_FLOAT, 16)
        four_floats = _load(builder, top, ir.VectorType(_FLOAT, 4))
        order = ir.Constant(ir.VectorType(_INT, 16), [0, 1, 2, 3] * 4)
        tops = builder.shuffle_vector(four_floats, four_floats, order)
        sums = cgutils.alloca_once_value(builder, ir.Constant(floats, [0.0] * 16))
        with cgutils.for_range(builder, fours) as four:
            at = builder.add(logits, builder.mul(four.index, _LONG(64)))
            found = _power_of_two(builder, builder.fsub(_load(builder, at, floats), tops))
            _store(builder, found, at)
            builder.store(builder.fadd(builder.load(sums), found), sums)
        _store(builder, _folded(builder, builder.load(sums), lambda builder, a, b: builder.fadd(a, b)), total)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 4), generate


@intrinsic(prefer_literal=True)
def add_weighted(typing: Any, kind: Any, values: Any, dim: Any, tokens: Any, weights: Any, out: Any, ahead: Any) -> Any:
    """Add to out [4, dim] the sum over tokens of weights [tokens, 4] times values [tokens, dim]; `ahead` as in `dots`."""
    stored = kind.literal_value

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        _, values, dim, tokens, weights, out, ahead = arguments
        size = _LONG
        row, out_row = builder.mul(dim, size(_BYTES_OF[stored])), builder.mul(dim, size(4))

        def columns(lanes: int, start: Any, count: Any) -> None:
            """Do `count` times `lanes` columns from `start` on, one vector of each query held in registers."""
            floats = ir.VectorType(_FLOAT, lanes)
            totals = [cgutils.alloca_once(builder, floats) for _ in range(4)]
            with cgutils.for_range(builder, count) as chunk:
                column = builder.add(start, builder.mul(chunk.index, size(lanes)))
                offset = builder.mul(column, size(_BYTES_OF[stored]))
                at, later = builder.add(values, offset), builder.add(ahead, offset)
                places = [
                    builder.add(builder.add(out, builder.mul(column, size(4))), builder.mul(out_row, size(q)))
                    for q in range(4)
                ]
                for total, place in zip(totals, places, strict=True):
                    builder.store(_load(builder, place, floats), total)
                with cgutils.for_range(builder, tokens) as token:
                    for line in range(0, lanes * _BYTES_OF[stored], 64):
                        _prefetch(builder, builder.add(later, builder.add(builder.mul(token.index, row), size(line))))
                    value = _widened(context, builder, stored, builder.add(at, builder.mul(token.index, row)), lanes)
                    given = builder.add(weights, builder.mul(token.index, size(16)))
                    for q, total in enumerate(totals):
                        weight = _splat(builder, _load(builder, builder.add(given, size(4 * q)), _FLOAT), lanes)
                        builder.store(_multiply_add(builder, value, weight, builder.load(total)), total)
                for total, place in zip(totals, places, strict=True):
                    _store(builder, builder.load(total), place)

        wide = builder.udiv(dim, size(32)) if _has_wide_registers(context) else size(0)
        columns(32, size(0), wide)
        done = builder.mul(wide, size(32))
        columns(16, done, builder.udiv(builder.sub(dim, done), size(16)))
        return context.get_dummy_value()

    return types.void(kind, *[types.int64] * 6), generate
