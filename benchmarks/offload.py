"""Decoding with the cache on disk, against the same in memory, and against streaming the whole cache from the same disk.

    attnpred bench offload [--context 32768] [--budget 0.0769] [--steps 6] [--rounds 4] [--churn 0.23] [--json]

Theory first. A step of the 1B shape (16 layers, 8 kv heads of 64, bf16) at 32K reads 1 GiB when it is dense; at a budget of
1/13 it attends to 79 MiB, of which only the blocks that are new in the selection have to come from the disk: the churn. The
page cache is dropped before every step, so every byte comes from the device, and the bandwidth of the device is measured in
the same run: whole pieces one after the other, and single blocks of one head, as a step reads them.

The model has random weights, so its attention says nothing about churn. The policy here does all of the work of
`predicted`, and then takes scores that drift (`Drifting`) so that as large a part of the forecast is new in every step
as on the demo LM's real decode, which is measured first (`real_decode`) and printed.

Variants take turns within one process; figures are medians over all steps, with their spread. The last line is JSON.
"""

import json
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

import attnpred
from attnpred.config import CacheConfig
from attnpred.evaluation.book import demo_book
from attnpred.hf import TieredCache, load_model
from attnpred.hf.sizes import estimate_for
from attnpred.policies.base import Policy, View
from attnpred.policies.predicted import Predicted
from attnpred.predictor.memory import Memory
from benchmarks import options
from benchmarks.environment import environment
from benchmarks.models import fill, random_model

LATE_SHARE, HYSTERESIS = 0.05, 0.5
"""Chosen on a training book (docs/LOG.md): a hysteresis of 0.5 halves what has to be moved, and recovers as much."""


@dataclass(frozen=True, slots=True)
class Drifting(Policy[Any]):
    """`predicted` with other scores in the end: a random walk for each layer, of which each step keeps `keep`."""

    inner: Predicted
    keep: float
    walks: dict[int, Tensor] = field(default_factory=dict)
    noise: Tensor = field(default_factory=lambda: torch.randn(1 << 22))
    corrects: ClassVar[bool] = True

    def memory(self, config: CacheConfig, layer: int) -> Memory:
        return self.inner.memory(config, layer)

    def _noise(self, shape: torch.Size) -> Tensor:
        first = int(torch.randint(self.noise.numel() - shape.numel(), (1,)))
        return self.noise[first : first + shape.numel()].view(shape)

    def score(self, view: View[Any]) -> Tensor:
        scores = self.inner.score(view)
        walk = self.walks.get(view.layer)
        if walk is None or walk.shape[-1] < scores.shape[-1]:
            grown = self._noise(scores.shape).clone()
            if walk is not None:
                grown[..., : walk.shape[-1]] = walk
            walk = self.walks[view.layer] = grown
        walk = walk[..., : scores.shape[-1]]
        if view.is_current:  # what the query asks for differs a little from the forecast
            return torch.add(walk, self._noise(walk.shape), alpha=0.2)
        return walk.mul_(self.keep).add_(self._noise(walk.shape), alpha=math.sqrt(1 - self.keep**2))


def keep_for(churn: float, blocks: int, chosen: int) -> float:
    """Return the `keep` with which a share `churn` of the best `chosen` of `blocks` is new in every step."""
    low, high = 0.5, 1.0
    for _ in range(12):
        keep = (low + high) / 2
        walk = torch.randn(64, blocks)
        later = walk * keep + torch.randn(64, blocks) * math.sqrt(1 - keep**2)
        marks = [
            torch.zeros(64, blocks, dtype=torch.bool).scatter_(1, x.topk(chosen).indices, True) for x in (walk, later)
        ]
        new = 1 - float((marks[0] & marks[1]).sum()) / (64 * chosen)
        low, high = (keep, high) if new > churn else (low, keep)
    return (low + high) / 2


def drop_page_cache(cache: TieredCache) -> None:
    """Let nothing of the cache's file be in memory; untimed."""
    if cache.backing is not None:
        cache.backing.tier.drop_page_cache()


@torch.no_grad()
def step_ms(model: Any, cache: TieredCache) -> float:
    """Return the milliseconds of one decode step."""
    drop_page_cache(cache)
    token = torch.randint(0, 1000, (1, 1))
    began = time.perf_counter()
    model(token, cache=cache, use_cache=True)
    return (time.perf_counter() - began) * 1e3


def total(cache: TieredCache) -> dict[str, Any]:
    """Return the sums over layers that a row is made of."""
    counts = cache.stats()["total"]
    return {
        name: counts.get(name, 0) for name in ("selected", "hits", "bytes_fetched", "bytes_streamed", "exposed_wait_ms")
    }


def bandwidth(cache: TieredCache, units: int = 4096) -> dict[str, float]:
    """Return GB/s of the tier: whole pieces in order, and single units of one layer at random places."""
    layer: Any = cache.layers[0]
    sealed, found = layer.store.sealed, {}
    for name in ("sequential", "units"):
        drop_page_cache(cache)
        began = time.perf_counter()
        if name == "sequential":
            size = sum(piece.keys.numel() * 2 * piece.keys.element_size() for piece in layer.store.pieces())
        else:
            places = torch.randperm(sealed.count * sealed.heads)[:units]
            rows, blocks = places % sealed.heads, places // sealed.heads
            coming = sealed.start_units(rows, blocks, torch.device("cpu"), layer.store.counts)
            size = sealed.finish(coming, layer.store.counts).numel()
        found[f"{name}_gb_per_s"] = size / (time.perf_counter() - began) / 1e9
    return found


@torch.no_grad()
def real_decode(context: int, steps: int, folder: Path | None, say: Callable[[str], None]) -> dict[str, Any]:
    """Decode the demo book with the demo LM and the cache on disk, at 1/13: what a real selection asks of the tier."""
    model, tokenizer = load_model("demo")
    tokens = tokenizer(demo_book(), return_tensors="pt", verbose=False)["input_ids"][:, : context + steps]
    settings = CacheConfig(
        budget=1 / 13, late_share=LATE_SHARE,
        hysteresis=HYSTERESIS, offload="disk", offload_dir=folder,
    )  # fmt: skip
    with attnpred.attach(model, config=settings) as attached, attached.new_cache() as cache:
        model(tokens[:, :context], cache=cache, use_cache=True, logits_to_keep=1)
        waits = []
        for i in range(context, tokens.shape[1]):
            drop_page_cache(cache)
            before = total(cache)
            model(tokens[:, i : i + 1], cache=cache, use_cache=True)
            waits.append(total(cache)["exposed_wait_ms"] - before["exposed_wait_ms"])
        counts = cache.stats()["total"]
    unit = 16 * 2 * 64 * 4
    row = {
        "shape": "demo",
        "dtype": "float32",
        "context": context,
        "variant": "disk",
        "bytes_per_token": counts["bytes_fetched"] / steps,
        "hit_rate": counts["hit_rate"],
        "fetched_late": counts["fetched_late"] / counts["selected"],
        "arrived_late": counts["arrived_late"] / counts["selected"],
        "churn": (counts["bytes_fetched"] / unit - counts["fetched_late"]) / counts["selected"],
        "exposed_wait_ms": statistics.median(waits),
    }
    say(f"demo LM, {context} tokens, real decode at 1/13, page cache dropped: {row['hit_rate']:.1%} of selected blocks there "
        f"on arrival, {row['churn']:.1%} prefetched, {row['fetched_late']:.1%} late")  # fmt: skip
    return row


def main(arguments: list[str] | None = None) -> None:
    parser = options.Options(prog="attnpred bench offload", description=__doc__.partition("\n")[0])
    parser.add_argument("--context", type=options.count, default=1 << 15)
    parser.add_argument("--budget", type=options.budget, default=1 / 13)
    parser.add_argument("--steps", type=options.count, default=6, help="steps of a variant in each round")
    parser.add_argument("--rounds", type=options.count, default=4)
    parser.add_argument(
        "--churn", type=options.share, default=None, help="default: what the demo LM's real decode shows"
    )
    parser.add_argument("--layers", type=options.count, default=16)
    parser.add_argument("--demo-steps", type=options.count, default=128, help="steps of the demo LM's real decode")
    parser.add_argument("--folder", type=Path, default=None, help="where the files go")
    parser.add_argument("--json", action="store_true", help="print nothing but the JSON line")
    args = parser.checked(arguments)
    say: Callable[[str], None] = (lambda line: None) if args.json else print
    real = real_decode(min(8192, args.context), args.demo_steps, args.folder, say)
    churn = real["churn"] if args.churn is None else args.churn

    model = random_model(args.layers)
    budget = int(args.budget) if args.budget > 1 else args.budget
    # The walk has its own inertia, so the hysteresis here is only there to cost what it costs.
    plain = CacheConfig(budget=budget, block_size=16, late_share=LATE_SHARE, hysteresis=1e-6)
    disk = replace(plain, offload="disk", offload_dir=args.folder)
    packed = replace(disk, offload_dtype="int8")
    blocks = args.context // 16
    forced = plain.smallest_budget // plain.block_size - 1  # sinks, recent window and the open block
    keep = keep_for(churn, blocks, plain.budget_blocks(args.context) - forced)
    general = Predicted()
    wanted = estimate_for(model.config, disk, general, torch.bfloat16, args.context)
    say(f"theory: a dense step reads {wanted.full:,} bytes, a sparse one {wanted.full * args.budget:,.0f}, of which "
        f"{churn:.1%} and {LATE_SHARE:.0%} come from the disk")  # fmt: skip

    variants: dict[str, tuple[str | Policy[Any], CacheConfig]] = {
        "memory": (Drifting(general, keep), plain),
        "disk": (Drifting(general, keep), disk),
        "disk-int8": (Drifting(general, keep), packed),
        "disk-full": ("full", disk),
    }
    caches: dict[str, TieredCache] = {}
    rows: list[dict[str, Any]] = [real]
    with attnpred.attach(model, policy=general, config=plain):
        for name, (policy, settings) in variants.items():
            caches[name] = TieredCache(model.config, policy=policy, config=settings)
            fill([caches[name]], model.config, args.context)
        speeds = bandwidth(caches["disk"])
        say(", ".join(f"{name} {speed:.2f}" for name, speed in speeds.items()))
        times: dict[str, list[float]] = {name: [] for name in variants}
        counted = {name: {"exposed_wait_ms": [0.0]} for name in variants}
        for name in variants:  # warm up: fetch what the first selection names
            for _ in range(2):
                step_ms(model, caches[name])
        start = {name: total(cache) for name, cache in caches.items()}
        for _ in range(args.rounds):
            for name, cache in caches.items():
                for _ in range(args.steps if name != "disk-full" else max(1, args.steps // 3)):
                    before = total(cache)["exposed_wait_ms"]
                    times[name].append(step_ms(model, cache))
                    counted[name]["exposed_wait_ms"].append(total(cache)["exposed_wait_ms"] - before)
        for name, cache in caches.items():
            counts, steps = total(cache), len(times[name])
            moved = {key: counts[key] - start[name][key] for key in counts}
            row = {
                "shape": "1b",
                "dtype": "bfloat16",
                "context": args.context,
                "variant": name,
                "ms_per_token": statistics.median(times[name]),
                "spread_ms": [min(times[name]), max(times[name])],
                "bytes_per_token": (moved["bytes_fetched"] + moved["bytes_streamed"]) / steps,
                "hit_rate": moved["hits"] / moved["selected"] if moved["selected"] else 1.0,
                "exposed_wait_ms": statistics.median(counted[name]["exposed_wait_ms"][1:]),
                "fast_bytes": cache.fast_bytes(),
            }
            rows.append(row)
            say(f"{name:<10}{row['ms_per_token']:9.1f} ms ({row['spread_ms'][0]:.0f} to {row['spread_ms'][1]:.0f}), "
                f"{row['bytes_per_token'] / 1e6:7.1f} MB read, {row['hit_rate']:.1%} there on arrival, waited "
                f"{row['exposed_wait_ms']:.1f} ms, {row['fast_bytes'] / 1e6:,.0f} MB of fast memory")  # fmt: skip
        for cache in caches.values():
            cache.close()
    by_name = {row["variant"]: row for row in rows[1:]}
    ratios = {
        "disk_full_over_disk": by_name["disk-full"]["ms_per_token"] / by_name["disk"]["ms_per_token"],
        "disk_over_memory": by_name["disk"]["ms_per_token"] / by_name["memory"]["ms_per_token"],
        "full_bytes_over_fast_bytes": by_name["memory"]["fast_bytes"] / by_name["disk"]["fast_bytes"],
    }
    say(", ".join(f"{name} {ratio:.2f}" for name, ratio in ratios.items()))
    facts = {"page_cache": "dropped before every step", "churn": churn, "budget": args.budget}
    facts |= {"late_share": LATE_SHARE, "hysteresis": HYSTERESIS}
    print(
        json.dumps(
            {"rows": rows, "ratios": ratios, "tier": speeds, "estimate": wanted.as_dict()} | facts | environment()
        )
    )


if __name__ == "__main__":
    main()
