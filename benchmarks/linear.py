"""One row times a matrix, cold: our kernels and torch's, against the speed at which memory is read in the same run.

    python -m benchmarks.linear [--rounds 15] [--shapes 576x576 ...] [--out docs/results/linear.json]

Theory first. Such a product reads every weight once and does two operations with it: nothing but memory limits it. With 32
weights in 34 bytes (int8) or 20 (int4), a call can be 3.8 or 6.4 times as fast as in fp32, if the arithmetic keeps up:
at 20 GB/s a core reads 32 weights of int8 in 1.7 ns, some five cycles. What a call costs besides is a few microseconds,
so small matrices cannot reach the limit: `fused` has three of them in one call.

Copies of a matrix take turns, more of them than any cache holds. Variants are interleaved, with a sample of the stream
(`benchmarks.limits`) in each round; `share` is the median of the speed over that of the stream in the same round.
Figures are medians with quartiles. `error` is the norm of the difference to fp32 arithmetic with the same weights, as a
share: what rounding the input costs. The last line is one JSON object.
"""

import json
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from attnpred.kernels.linear import Packed, pack, product
from attnpred.kernels.numba_linear import Matrices
from benchmarks import options
from benchmarks.environment import environment
from benchmarks.limits import ColdMemory

SHAPES = ("576x576", "1536x576", "576x1536", "2048x2048", "8192x2048", "2048x8192", "49152x576")
"""Rows by width: of SmolLM2, of a model of 1B, and the language-model head of SmolLM2."""
COLD = 96 << 20
"""Bytes of all copies of a matrix, at least."""
LEAST_SECONDS = 2e-3
"""Of one sample."""
STREAMED = 32
"""A sample of the stream is as short: a part of so many of the memory."""


class Variant(NamedTuple):
    """calls: one for each copy; size: bytes that a call reads."""

    name: str
    calls: list[Callable[[], Tensor]]
    size: int
    error: float


def copied(weight: Packed | Tensor) -> Packed | Tensor:
    if isinstance(weight, Tensor):
        return weight.clone()
    parts = {name: getattr(weight, name) for name in ("codes", "scales", "offsets")}
    return replace(weight, **{name: part.clone() for name, part in parts.items() if part is not None})


def copies(size: int) -> int:
    return max(2, -(-COLD // size))


def variants(rows: int, width: int, vectors: int) -> list[Variant]:
    """Return all ways to multiply."""
    weight, x = torch.randn(rows, width), torch.randn(vectors, width)
    found = []

    def add(name: str, make: Callable[[], Callable[[], Tensor]], size: int, wanted: Tensor) -> None:
        calls = [make() for _ in range(copies(size))]
        error = float((calls[0]().float() - wanted).norm() / wanted.norm())
        found.append(Variant(name, calls, size, error))

    def ours(given: Packed | Tensor, dtype: torch.dtype, number: int = 1) -> Callable[[], Callable[[], Tensor]]:
        def make() -> Callable[[], Tensor]:
            own = [copied(given) for _ in range(number)]
            matrices, row = Matrices(own, [None] * number, dtype), x.to(dtype)
            return lambda: matrices.product(row)

        return make

    for name, bits in (("int8", 8), ("int4", 4)):
        packed = pack(weight, bits)
        add(name, ours(packed, torch.float32), packed.bytes(), product(x, packed))
        if packed.bytes() < 1 << 20:
            wanted = product(x, packed).repeat(1, 3)
            add(f"{name} fused", ours(packed, torch.float32, 3), 3 * packed.bytes(), wanted)
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        plain, row = weight.to(dtype), x.to(dtype)
        wanted = product(row.float(), plain)
        add(name, ours(plain, dtype), plain.nbytes, wanted)

        def torch_linear(plain: Tensor = plain, row: Tensor = row) -> Callable[[], Tensor]:
            own = plain.clone()
            return lambda: torch.nn.functional.linear(row, own)

        add(f"torch {name}", torch_linear, plain.nbytes, wanted)
    scales = weight.abs().amax(1) / 127
    codes = (weight / scales[:, None]).round().to(torch.int8)

    def torch_int8() -> Callable[[], Tensor]:
        own, row, scale = codes.clone(), x.bfloat16(), scales.bfloat16()
        return lambda: torch._weight_int8pack_mm(row, own, scale)

    wanted = product(x.bfloat16().float(), codes.float() * scales[:, None])
    add("torch int8", torch_int8, codes.nbytes, wanted)
    return found


def measure(rows: int, width: int, vectors: int, rounds: int, memory: ColdMemory) -> list[dict[str, Any]]:
    """Return a row for each variant."""
    chosen = variants(rows, width, vectors)
    taken: dict[str, list[float]] = {one.name: [] for one in chosen}
    shares: dict[str, list[float]] = {one.name: [] for one in chosen}
    at = dict.fromkeys(taken, 0)
    for turn in range(rounds + 1):
        stream = statistics.median(memory.stream(STREAMED) for _ in range(5))
        for one in chosen:
            number, began, spent = 0, time.perf_counter(), 0.0
            while spent < LEAST_SECONDS or number < 2:
                one.calls[at[one.name] % len(one.calls)]()
                at[one.name] += 1
                number += 1
                spent = time.perf_counter() - began
            if turn:  # the first warms up
                taken[one.name].append(spent / number)
                shares[one.name].append(one.size * number / spent / 1e9 / stream)
    result = []
    for one in chosen:
        spent = [x * 1e6 for x in taken[one.name]]
        low, middle, high = statistics.quantiles(spent, n=4) if len(spent) > 1 else spent * 3
        result.append(
            {"rows": rows, "width": width, "vectors": vectors, "variant": one.name, "bytes": one.size}
            | {"us": round(middle, 1), "spread": [round(low, 1), round(high, 1)]}
            | {"gb_per_s": round(one.size / middle / 1e3, 2), "share": round(statistics.median(shares[one.name]), 3)}
            | {"error": float(f"{one.error:.2g}")}
        )
    return result


def main(arguments: list[str] | None = None) -> None:
    parser = options.Options(prog="python -m benchmarks.linear", description=__doc__.partition("\n")[0])
    parser.add_argument("--shapes", nargs="+", default=SHAPES, help="rows x width")
    parser.add_argument("--vectors", type=options.count, nargs="+", default=[1], help="rows of input in a call, 1 to 8")
    parser.add_argument("--rounds", type=options.count, default=15)
    parser.add_argument("--out", type=Path, help="write the last line there too")
    parser.add_argument("--json", action="store_true", help="print nothing but the JSON line")
    args = parser.checked(arguments)
    memory, found = ColdMemory(1 << 30), []
    for shape in args.shapes:
        rows, width = map(int, shape.split("x"))
        for vectors in args.vectors:
            for row in measure(rows, width, vectors, args.rounds, memory):
                found.append(row)
                if not args.json:
                    low, high = row["spread"]
                    print(
                        f"{shape:>11} x {vectors} {row['variant']:<11} {row['us']:9.1f} us ({low:.1f} to {high:.1f}) "
                        f"{row['gb_per_s']:6.2f} GB/s, {row['share']:4.0%} of the stream, error {row['error']:.0e}",
                        flush=True,
                    )
    line = json.dumps({"rows": found, "limit": memory.method} | environment())
    options.write_line(args, line)
    print(line)


if __name__ == "__main__":
    main()
