"""Microseconds of one attention call of a decode step: dense paths and sparse kernels, against the speed of memory.

    attnpred bench attention [--shapes 1b 8b] [--dtypes bfloat16] [--contexts 4096 ...] [--budgets 512 1024 0.0769] [--json]

Theory first. One query reads keys and values once: 2 * Hkv * tokens * D numbers, and does 4 * Hq * tokens * D operations on
them: two to four for every byte in bf16 with four query heads to a kv head, so memory is the limit. `limit_us` is what
reading the bytes takes at least: in one stream if dense, in blocks of 16 tokens at random places if sparse, both measured
between the calls (`benchmarks.limits`), where in a step the weights of the layer pass through all caches.

    transformers   SDPA with `enable_gqa`, as `sdpa_attention_forward` calls it; above 16K tokens only with --all, for it is
                   30 times slower than memory in bf16
    packed         SDPA with the query heads of a group as its queries, [1, Hkv, G, D]: the fastest call of stock torch
    dense          `kernels.dense_decode`
    sparse-NAME    `sparse_decode` of the backend NAME, over fresh random blocks in every call

Before any time is taken every variant is held against attention in fp32 (`TOLERANCE`); an error ends the run. Data is cold:
each call goes to another of several layers, 256 MB or more in all. Variants take turns; figures are medians with quartiles.
The last line is one JSON object.
"""

import json
import math
import statistics
import sys
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention as sdpa

from attnpred import kernels
from attnpred.store.pool import BlockPool
from benchmarks import options
from benchmarks.environment import environment
from benchmarks.limits import ColdMemory, shown, summary
from benchmarks.models import DTYPES

SHAPES = {"demo": (4, 2, 64), "1b": (32, 8, 64), "8b": (32, 8, 128)}
"""Query heads, kv heads, head dimension."""

CONTEXTS = (4096, 16_384, 32_768, 65_536, 131_072)
BUDGETS = (512, 1024, 1 / 13)
BLOCK = 16
TOLERANCE = {"bfloat16": 2e-2, "float32": 1e-4}
"""Largest difference to fp32, as a share of the largest output."""

COLD_BYTES, MOST_BYTES = 256 << 20, 6 << 30
PERIOD = 8184
"""Tokens after which keys and values repeat: fresh ones for all layers would take minutes."""

TRANSFORMERS_UP_TO, TRANSFORMERS_ROUNDS = 16_384, 3


class Call(NamedTuple):
    """One variant: `run` gives the output [1, Hq, Dv] for a query, a layer and a selection."""

    variant: str
    budget: float | None
    tokens: int
    run: Callable[[Tensor, BlockPool, Tensor | None], Tensor]


def transformers_call(query: Tensor, pool: BlockPool, selection: Tensor | None) -> Tensor:
    keys, values = pool.view()
    return sdpa(query[:, :, None], keys, values, scale=query.shape[-1] ** -0.5, enable_gqa=True)[:, :, 0]


def packed_call(query: Tensor, pool: BlockPool, selection: Tensor | None) -> Tensor:
    keys, values = pool.view()
    return sdpa(query.view(1, pool.heads, -1, query.shape[-1]), keys, values, scale=query.shape[-1] ** -0.5).flatten(
        1, 2
    )


def dense_call(query: Tensor, pool: BlockPool, selection: Tensor | None) -> Tensor:
    return kernels.dense_decode(query, *pool.view(), scale=query.shape[-1] ** -0.5)[0]


def sparse_call(name: str) -> Callable[[Tensor, BlockPool, Tensor | None], Tensor]:
    """Return the sparse call of one backend."""
    decode = kernels.DECODE_BACKENDS[name]

    def run(query: Tensor, pool: BlockPool, selection: Tensor | None) -> Tensor:
        scale = query.shape[-1] ** -0.5
        return decode(query, pool.keys, pool.values, selection, pool.length, block_size=BLOCK, scale=scale)[0]

    return run


def calls(context: int, budgets: list[float]) -> list[Call]:
    """Return all variants."""
    found = [
        Call("transformers", None, context, transformers_call),
        Call("packed", None, context, packed_call),
        Call("dense", None, context, dense_call),
    ]
    for budget in budgets:
        blocks = int(budget if budget > 1 else budget * context) // BLOCK
        if blocks * BLOCK < context:
            found += [
                Call(f"sparse-{name}", budget, blocks * BLOCK, sparse_call(name))
                for name in kernels.DECODE_BACKENDS
                if name != "reference" and (name != "numba" or find_spec("numba"))
            ]
    return found


def make_layers(kv_heads: int, dim: int, context: int, dtype: torch.dtype) -> list[BlockPool]:
    """Return enough layers for their keys and values to be in no cache."""
    size = 2 * kv_heads * context * dim * dtype.itemsize
    count = max(2, math.ceil(COLD_BYTES / size))
    if size * count > MOST_BYTES:
        sys.exit(f"got {count} layers of {size:,} bytes, expected {MOST_BYTES:,} in all: take a shorter context")
    numbers = torch.randn(2, kv_heads, min(context, PERIOD), dim).to(dtype)
    layers = []
    for _ in range(count):
        pool = BlockPool(BLOCK)
        keys, values = (x.repeat(1, 1, -(-context // x.shape[2]), 1)[:, :, :context] for x in numbers[:, None])
        pool.append(keys, values)
        layers.append(pool)
    return layers


def random_selection(kv_heads: int, context: int, tokens: int) -> Tensor:
    """Return as many whole blocks as `tokens` fill, for every kv head."""
    return torch.rand(1, kv_heads, context // BLOCK).topk(tokens // BLOCK, -1).indices


def expected(query: Tensor, pool: BlockPool, selection: Tensor | None) -> Tensor:
    """Return the attention in fp32."""
    keys, values = pool.view()
    if selection is not None:
        places = (selection[..., None] * BLOCK + torch.arange(BLOCK)).flatten(2)[..., None]
        keys, values = (x.gather(2, places.expand(-1, -1, -1, x.shape[3])) for x in (keys, values))
    grouped = query.float().view(1, keys.shape[1], -1, query.shape[-1])
    logits = grouped @ keys.float().transpose(2, 3) * query.shape[-1] ** -0.5
    return (logits.softmax(-1) @ values.float()).flatten(1, 2)


def check(call: Call, query: Tensor, pool: BlockPool, selection: Tensor | None, tolerance: float) -> float:
    """Return the largest difference to fp32 as a share of the largest output; end the run if it is too large."""
    wanted = expected(query, pool, selection)
    share = float((call.run(query, pool, selection).float() - wanted).abs().max() / wanted.abs().max())
    if not share <= tolerance:
        sys.exit(
            f"got outputs of {call.variant} that are {share:.1e} off, expected {tolerance:.0e} at most: no times taken"
        )
    return share


@torch.no_grad()
def measure(
    shape: str, dtype: str, context: int, budgets: list[float], rounds: int, memory: ColdMemory, every: bool
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Return a row for every variant, and the limits that were measured between them."""
    heads, kv_heads, dim = SHAPES[shape]
    kind = DTYPES[dtype]
    block_bytes = BLOCK * dim * kind.itemsize
    layers, chosen = make_layers(kv_heads, dim, context, kind), calls(context, budgets)
    if context > TRANSFORMERS_UP_TO and not every:
        chosen = chosen[1:]

    def inputs(call: Call) -> tuple[Tensor, Tensor | None]:
        selection = None if call.budget is None else random_selection(kv_heads, context, call.tokens)
        return torch.randn(1, heads, dim).to(kind), selection

    errors = {}
    for call in chosen:
        query, selection = inputs(call)
        errors[call[:2]] = check(call, query, layers[0], selection, TOLERANCE[dtype])
    times: dict[tuple[str, float | None], list[float]] = {call[:2]: [] for call in chosen}
    streams, blocks, turn = [], {block_bytes: []}, 0  # type: ignore[var-annotated]
    for number in range(rounds + 1):
        blocks[block_bytes].append(memory.blocks(block_bytes))
        for call in chosen:
            if call.variant == "transformers" and number > TRANSFORMERS_ROUNDS:
                continue
            (query, selection), pool = inputs(call), layers[turn % len(layers)]
            turn += 1
            streams.append(memory.stream())  # as the weights of a layer pass through all caches between two calls
            began = time.perf_counter()
            call.run(query, pool, selection)
            if number:  # the first warms up
                times[call[:2]].append((time.perf_counter() - began) * 1e6)
    limits = summary(memory, streams[len(chosen) :], {block_bytes: blocks[block_bytes][1:]})
    rows = []
    for call in chosen:
        size = 2 * kv_heads * call.tokens * dim * kind.itemsize
        speed = limits["stream_gb_per_s"] if call.budget is None else limits["block_gb_per_s"][str(block_bytes)]
        taken = times[call[:2]]
        quartiles = statistics.quantiles(taken, n=4) if len(taken) > 1 else taken * 3
        rows.append(
            {"shape": shape, "dtype": dtype, "context": context, "variant": call.variant}
            | ({} if call.budget is None else {"budget": round(call.budget, 4)})
            | {"tokens": call.tokens, "us": round(statistics.median(taken), 1), "bytes": size}
            | {"flop": 4 * heads * call.tokens * dim, "limit_us": round(size / speed / 1e3, 1)}
            | {"quartiles": [round(quartiles[0], 1), round(quartiles[2], 1)], "error": errors[call[:2]]}
        )
    return rows, limits


def main(arguments: list[str] | None = None) -> None:
    parser = options.Options(prog="attnpred bench attention", description=__doc__.partition("\n")[0])
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--contexts", type=options.count, nargs="+", default=CONTEXTS)
    parser.add_argument("--budgets", type=options.budget, nargs="+", default=BUDGETS, help="tokens, or a share up to 1")
    parser.add_argument("--rounds", type=options.count, default=15)
    parser.add_argument(
        "--cold-mebibytes", type=options.count, default=512, help="memory that the limits are measured on"
    )
    parser.add_argument("--all", action="store_true", help="transformers' path at every context")
    parser.add_argument("--out", type=Path, help="write the last line there too")
    parser.add_argument("--json", action="store_true", help="print nothing but the JSON line")
    args = parser.checked(arguments)
    say: Callable[[str], None] = (lambda line: None) if args.json else print
    if any(context % BLOCK for context in args.contexts):
        parser.error(f"got a context that is no multiple of {BLOCK}")
    memory, rows, limits = ColdMemory(args.cold_mebibytes << 20), [], []  # type: ignore[var-annotated]
    for shape in args.shapes:
        heads, kv_heads, dim = SHAPES[shape]
        for dtype in args.dtypes:
            token = 2 * kv_heads * dim * DTYPES[dtype].itemsize
            say(f"\n{shape}, {heads}/{kv_heads} heads of {dim}, {dtype}. Theory: {token:,} bytes and {4 * heads * dim:,} "
                f"operations for every token that is attended to")  # fmt: skip
            for context in args.contexts:
                new, found = measure(shape, dtype, context, args.budgets, args.rounds, memory, args.all)
                say(f"{context:,} tokens; {shown(found)}")
                for row in new:
                    over, budget = row["us"] / row["limit_us"], row.get("budget", "")
                    low, high = row["quartiles"]
                    say(f"  {row['variant']:<13}{budget:>8}{row['us']:11,.0f} us ({low:,.0f} to {high:,.0f}), "
                        f"{over:5.1f} times the limit; error {row['error']:.0e}")  # fmt: skip
                rows += new
                limits.append({"shape": shape, "dtype": dtype, "context": context} | found)
    line = json.dumps({"rows": rows, "limits": limits, "tolerance": TOLERANCE, "block_size": BLOCK} | environment())
    options.write_line(args, line)
    print(line)


if __name__ == "__main__":
    main()
