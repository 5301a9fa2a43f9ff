"""On an NVIDIA GPU: the Triton kernels against torch, dense attention and the memory, and whole decode steps.

    sh benchmarks/gpu.sh            checks, tests, and this; the last line is JSON
    python -m benchmarks.gpu [--parts attention selection decode] [--contexts 4096 32768 131072] [--rounds 30]

Theory first. A call can take no less time than its bytes at the bandwidth that a copy of 1 GiB has on the same GPU in the
same run (`limit_us`; a copy reads and writes, both are counted). Sparse attention at 1/13 has 1/13 of the bytes of dense
attention, so it should be near 13 times faster where dense attention is bound by memory, and bound by launches at short
contexts. `wall_us` is what a caller waits for a single call, launches included.

Every call has a selection of its own, and before each the L2 cache is filled with something else. That takes long enough
for the host to have launched everything by then, so events measure the GPU alone. Variants take turns; figures are medians
with quartiles. Decode steps are of a model of the 1B shape with random weights and a random cache, on the host's clock;
what such a model attends to says nothing of how many blocks a real one has to fetch (`predicted-offloaded`).

A part that fails leaves a row with `error`, and the next one goes on.
"""

import argparse
import gc
import json
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention as sdpa
from transformers.cache_utils import Cache, DynamicCache

import attnpred
from attnpred.config import CacheConfig
from attnpred.hf import TieredCache, cache_argument
from attnpred.kernels import digest, stream
from attnpred.kernels import torch as plain
from attnpred.kernels.dense import AttentionTerms
from benchmarks.environment import environment
from benchmarks.models import random_model

SHAPES = {"1b": (32, 8, 64), "8b": (32, 8, 128)}
"""Query heads, kv heads, D."""
BLOCK, SHARE = 16, 13
PARTS = ("attention", "selection", "decode")
CONTEXTS, DECODED = (4096, 8192, 16_384, 32_768, 65_536, 131_072), (32_768, 131_072)
COPIED = 1 << 30
EVICTED = 1 << 30
"""Bytes written to have nothing in the L2 cache (up to 128 MiB), and to keep the GPU busy while a call is launched."""

Row = dict[str, Any]
Call = Callable[[int], Any]


class Clock:
    """Times calls on one device; on a CPU, which is for dry runs, by the host's clock."""

    def __init__(self, device: torch.device, copied: int = COPIED, evicted: int = EVICTED) -> None:
        self.device = device
        self.evicting = torch.empty(evicted, dtype=torch.uint8, device=device)
        source = torch.zeros(copied, dtype=torch.uint8, device=device)
        target = torch.empty_like(source)
        row = self.run({"copy": lambda i: target.copy_(source)}, 10)["copy"]
        self.bandwidth = 2 * copied / row["us"] * 1e6

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def once(self, call: Callable[[], Any]) -> float:
        """Return the microseconds that the device takes."""
        self.evicting.fill_(1)
        if self.device.type != "cuda":
            began = time.perf_counter()
            call()
            return (time.perf_counter() - began) * 1e6
        first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        first.record()
        call()
        last.record()
        last.synchronize()
        return float(first.elapsed_time(last)) * 1e3

    def wall(self, call: Callable[[], Any]) -> float:
        """Return the microseconds until the host has the result."""
        self.wait()
        began = time.perf_counter()
        call()
        self.wait()
        return (time.perf_counter() - began) * 1e6

    def run(self, calls: dict[str, Call], rounds: int) -> dict[str, Row]:
        """Return median and quartiles of each; a call gets the number of its round. One that fails gets its error."""
        rows: dict[str, Row] = {}
        for name, call in calls.items():
            try:
                for i in range(3):  # compiles, and wakes the clocks
                    call(i % rounds)
                self.wait()
                rows[name] = {}
            except Exception as error:
                rows[name] = failed(error)
        going = {name: call for name, call in calls.items() if not rows[name]}
        times: dict[str, list[float]] = {name: [] for name in going}
        walls: dict[str, list[float]] = {name: [] for name in going}
        for i in range(rounds):
            for name, call in going.items():
                times[name].append(self.once(lambda call=call, i=i: call(i)))  # type: ignore[misc]
                walls[name].append(self.wall(lambda call=call, i=i: call(i)))  # type: ignore[misc]
        for name in going:
            rows[name] = {"us": statistics.median(times[name]), "spread_us": quartiles(times[name])}
            rows[name]["wall_us"] = statistics.median(walls[name])
        return rows


def quartiles(times: Sequence[float]) -> list[float]:
    return statistics.quantiles(times, n=4)[::2] if len(times) > 1 else [times[0], times[0]]


def failed(error: Exception) -> Row:
    """Return what a row says instead of times; the traceback goes to stderr."""
    traceback.print_exception(error, file=sys.stderr)
    return {"error": f"{type(error).__name__}: {error}".partition("\n")[0][:300]}


def selections(kv_heads: int, blocks: int, chosen: int, rounds: int, device: torch.device) -> list[Tensor]:
    """Return a random selection for each round, the blocks of each in rising order, as a store may give them."""
    return [
        torch.rand(1, kv_heads, blocks, device=device).topk(chosen, -1).indices.sort(-1).values for _ in range(rounds)
    ]


def attention(clock: Clock, shape: str, context: int, rounds: int) -> Iterator[Row]:
    """One query over 1/13 of the blocks, and over all of them."""
    from attnpred.kernels import triton_decode

    (heads, kv_heads, dim), device = SHAPES[shape], clock.device
    query = torch.randn(1, heads, dim, device=device, dtype=torch.bfloat16)
    keys, values = torch.randn(2, 1, kv_heads, context, dim, device=device, dtype=torch.bfloat16).unbind()
    chosen = max(1, context // BLOCK // SHARE)
    ids = selections(kv_heads, context // BLOCK, chosen, rounds, device)
    named: dict[str, Any] = {"block_size": BLOCK, "scale": dim**-0.5}
    packed = query.view(1, kv_heads, heads // kv_heads, dim)
    calls: dict[str, Call] = {
        "triton": lambda i: triton_decode.sparse_decode(query, keys, values, ids[i], context, **named),
        "torch": lambda i: plain.sparse_decode(query, keys, values, ids[i], context, **named),
        "dense_gqa": lambda i: sdpa(query[:, :, None], keys, values, enable_gqa=True),
        "dense_packed": lambda i: sdpa(packed, keys, values),
    }
    token = kv_heads * dim * 2 * keys.element_size()
    for name, found in clock.run(calls, rounds).items():
        size = token * (context if name.startswith("dense") else chosen * BLOCK)
        row = {"shape": shape, "dtype": "bfloat16", "context": context, "variant": name, "blocks": chosen}
        yield row | found | {"bytes": size, "limit_us": size / clock.bandwidth * 1e6}
    try:
        got, want = calls["triton"](0), calls["torch"](0)
        worst = [float((x.float() - y.float()).abs().max()) for x, y in zip(got, want, strict=True)]
        yield {"shape": shape, "context": context, "variant": "triton_minus_torch", "most": worst}
    except Exception as error:
        yield {"shape": shape, "context": context, "variant": "triton_minus_torch"} | failed(error)


def selection(clock: Clock, context: int, rounds: int) -> Iterator[Row]:
    """What is done with all blocks of a layer of the 8B shape for one token."""
    from attnpred.kernels import triton_select

    (heads, kv_heads, dim), device, blocks = SHAPES["8b"], clock.device, context // BLOCK
    chosen = max(2, blocks // SHARE)
    query = torch.randn(kv_heads, heads // kv_heads, dim, device=device) * dim**-0.5
    codes = digest.pack(torch.randn(kv_heads, blocks, dim, device=device))
    estimate = torch.randn(1, kv_heads, blocks, device=device) - 8
    past = torch.randn(1, kv_heads, 1, blocks + 16, device=device) - 8
    weights, distance = torch.randn(*estimate.shape[:2], 4, device=device), torch.rand(blocks, device=device)
    maxima = torch.rand(1, kv_heads, chosen, device=device)
    ids = selections(kv_heads, blocks, chosen, rounds, device)
    calls: dict[str, Call] = {}
    for backend, shares, kernels in (
        ("triton", triton_select.digest_shares, triton_select),
        ("torch", digest.digest_shares_reference, stream),
    ):
        calls[f"digest_shares/{backend}"] = lambda i, shares=shares: shares(query, codes, 1)
        calls[f"weigh/{backend}"] = lambda i, on=kernels: on.weigh(estimate, past, weights, distance, 0, blocks, blocks)
        calls[f"remember/{backend}"] = lambda i, on=kernels: on.remember(
            past, 0.03, blocks, estimate, weights, distance, ids[i], maxima
        )
    calls["choose/torch"] = lambda i: stream.choose(estimate, 1, blocks - 3, blocks, chosen - 1)
    moved = {"digest_shares": codes.numel(), "weigh": 4 * estimate.numel() * 4, "remember": 4 * estimate.numel() * 4}
    for name, found in clock.run(calls, rounds).items():
        size = moved.get(name.partition("/")[0], 4 * estimate.numel())
        row = {"context": context, "kv_heads": kv_heads, "variant": name, "blocks": blocks}
        yield row | found | {"bytes": size, "limit_us": size / clock.bandwidth * 1e6}


@torch.no_grad()
def fill(cache: Cache, config: Any, context: int, device: torch.device) -> None:
    """Fill `cache` with random keys and values, as a prompt would; memories see the keys, and rows of random queries."""
    generator = torch.Generator(device).manual_seed(0)

    def random(heads: int, tokens: int) -> Tensor:
        found = torch.randn(1, heads, tokens, config.head_dim, generator=generator, device=device)
        return found.to(torch.bfloat16)

    for layer in range(config.num_hidden_layers):
        keys, values = random(config.num_key_value_heads, context), random(config.num_key_value_heads, context)
        queries = random(config.num_attention_heads, min(64, context))
        cache.update(keys, values, layer)
        if isinstance(cache, TieredCache):
            held: Any = cache.layers[layer]
            terms = AttentionTerms(config.head_dim**-0.5)
            cache.decoder(layer).observe(queries, held.store, terms, None, prompt=True, keys=keys)


@torch.no_grad()
def decode(clock: Clock, model: Any, context: int, steps: int) -> Iterator[Row]:
    """Steps of the whole model, one variant after the other, each with the memory to itself."""
    config, device = model.config, clock.device
    settings = CacheConfig(budget=1 / SHARE)
    makers: dict[str, Callable[[], Cache]] = {
        "transformers": lambda: DynamicCache(config=config),
        "transformers-offloaded": lambda: DynamicCache(config=config, offloading=True),
        "predicted": lambda: TieredCache(config, config=settings),
        "predicted-offloaded": lambda: TieredCache(config, config=replace(settings, offload="cpu")),
    }
    for name, make in makers.items():
        row: Row = {"shape": "1b", "dtype": "bfloat16", "context": context, "variant": name}
        try:
            if name.startswith("predicted"):
                with attnpred.attach(model, config=settings):
                    yield row | steps_of(clock, model, make(), context, steps)
            else:
                yield row | steps_of(clock, model, make(), context, steps)
        except Exception as error:
            yield row | failed(error)
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()


def steps_of(clock: Clock, model: Any, cache: Cache, context: int, steps: int) -> Row:
    """Fill `cache`, and return what the steps after it take."""
    device, times = clock.device, []
    is_gpu = device.type == "cuda"
    before = torch.cuda.memory_allocated(device) if is_gpu else 0
    fill(cache, model.config, context, device)
    held = torch.cuda.memory_allocated(device) - before if is_gpu else 0
    for i in range(steps + 5):
        token = torch.full((1, 1), i + 1, device=device)
        taken = clock.wall(lambda token=token: model(token, **cache_argument(cache), use_cache=True, logits_to_keep=1))  # type: ignore[misc]
        if i >= 5:  # the first compile kernels
            times.append(taken / 1e3)
    found: Row = {"ms_per_token": statistics.median(times), "spread_ms": quartiles(times), "cache_bytes": held}
    if is_gpu:
        found["waits_per_step"] = waits(lambda: model(token, **cache_argument(cache), use_cache=True, logits_to_keep=1))
    if isinstance(cache, TieredCache):
        counts = cache.stats()["total"]
        found |= {name: counts[name] for name in ("selected", "bytes_fetched") if name in counts}
    return found


def waits(call: Callable[[], Any]) -> int:
    """Return how often `call` makes the host wait for the GPU, as far as torch knows."""
    import warnings

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            call()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return sum("synchroniz" in str(each.message).lower() for each in caught)


def about(device: torch.device) -> Row:
    """Return what the GPU is."""
    import triton

    found: Row = {"triton": triton.__version__}
    if device.type == "cuda":
        known = torch.cuda.get_device_properties(device)
        found |= {"gpu": known.name, "processors": known.multi_processor_count, "memory": known.total_memory}
        found |= {"capability": list(torch.cuda.get_device_capability(device)), "cuda": torch.version.cuda}
    return found


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="benchmarks.gpu", description=__doc__.partition("\n")[0])
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--contexts", nargs="+", type=int, default=list(CONTEXTS))
    parser.add_argument("--decoded", nargs="+", type=int, default=list(DECODED), help="contexts of whole decode steps")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--layers", type=int, default=16, help="of the model")
    parser.add_argument("--tests", default="not run", help="what the tests said, for the JSON line")
    parser.add_argument("--device", default="cuda", help=argparse.SUPPRESS)  # cpu: a dry run, in the interpreter
    parser.add_argument("--shape", default="1b", help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    device, is_dry = torch.device(args.device), args.device == "cpu"
    if not is_dry and not torch.cuda.is_available():
        print(
            f"got no CUDA device (torch {torch.__version__}), expected one: run this on a machine with an NVIDIA GPU, "
            "with a build of torch for CUDA",
            file=sys.stderr,
        )
        return 2
    torch.manual_seed(0)
    clock = Clock(device, *((1 << 16, 1 << 10) if is_dry else ()))
    print(f"{about(device)}, copies at {clock.bandwidth / 1e9:,.0f} GB/s", file=sys.stderr)
    rows: dict[str, list[Row]] = {part: [] for part in PARTS}

    def take(part: str, found: Iterator[Row]) -> None:
        try:
            for row in found:
                rows[part].append(row)
                print(part, json.dumps(row), file=sys.stderr, flush=True)
        except Exception as error:
            rows[part].append(failed(error))

    if "attention" in args.parts:
        for shape in SHAPES:
            for context in args.contexts:
                take("attention", attention(clock, shape, context, args.rounds))
    if "selection" in args.parts:
        for context in args.contexts:
            take("selection", selection(clock, context, args.rounds))
    if "decode" in args.parts:
        model = random_model(args.layers, shape=args.shape).to(device)
        for context in args.decoded:
            take("decode", decode(clock, model, context, args.steps))
    facts = {"copy_gb_per_s": clock.bandwidth / 1e9, "tests": args.tests, "share": 1 / SHARE}
    print(json.dumps(rows | facts | about(device) | environment()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
