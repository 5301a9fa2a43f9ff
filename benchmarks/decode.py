"""Milliseconds of a decode step: the floor, what stock torch and transformers can do, our own dense path, and `predicted`.

    attnpred bench decode [--shapes 1b] [--contexts 4096 16384 32768 65536] [--dtypes bfloat16] [--weights int8] [--json]

Theory first. A step reads the weights once, which the floor does too (`benchmarks.baselines`: the same model without
attention); a dense step also reads keys and values of every token, a sparse one those of its budget, and its digests. So
`predicted` should cost the same at 64K as at 4K, and both should lie on the floor.

    floor          attention and cache removed
    transformers   DynamicCache and SDPA, as `generate` has them by default
    packed         preallocated cache, and SDPA over packed groups: the strongest that stock torch has
    dense          attnpred with policy "full"
    predicted      attnpred with a budget, everything on: forecast, correction, memory, all layers sparse
    fits           attnpred with a budget that holds all of it, at the shortest context: what attaching costs then
    NAME           attnpred with another policy (--policies)

"demo" is the embedded LM on real text in fp32, at 4,096 tokens; the others have random weights and random caches. Before
any time is taken, all variants have to give the same tokens on a tiny model (`check`), `predicted` with a budget of
everything, but by its sparse path. Variants take turns in one process: step by step, or, for the demo LM, 32 steps each.
Figures are medians with quartiles; ratios are medians over rounds of the ratio within the round, for the speed of memory
drifts; so the longest context has `predicted` at the shortest beside it, which gives the growth. A step of transformers
that takes more than 3 s is taken twice. The last line is one JSON object.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from attnpred.config import CacheConfig
from attnpred.evaluation.book import demo_book
from attnpred.hf import TieredCache, load_model, pack_weights
from benchmarks import options
from benchmarks.baselines import FloorLayer, Variant, make_variants, step, switchable
from benchmarks.environment import environment
from benchmarks.models import DTYPES, SHAPES, fill, random_model, row_bytes

VARIANTS = ("floor", "transformers", "packed", "dense", "predicted", "fits")
DENSE = ("packed", "dense")
SHORT = "predicted at the shortest context"
LAYERS = {"8b": 2}
"""Layers of a shape, if not all: 32 layers of 8B have 14 GB of weights."""

DEMO_CONTEXT, DEMO_STEPS = 4096, 32
TOO_LONG_MS = 3000.0
TOLERANCE = 1e-4
"""Largest difference to the logits of transformers in fp32, as a share of the largest."""

MOST_MEMORY = 0.85
"""Share of the free memory that the caches of one context may take."""

Times = dict[str, list[list[float]]]
"""Milliseconds of each step, by variant and round."""


def settings_for(budget: int | float) -> CacheConfig:
    return CacheConfig(budget=budget)


def check(tokens: int = 200, steps: int = 8) -> float:
    """Return the largest difference of logits to transformers on a tiny model, as a share; end the run if it is large."""
    model = random_model(shape="tiny", dtype=torch.float32)
    for name, parameter in model.named_parameters():  # so that attention is far from even
        parameter.data = torch.ones_like(parameter) if "norm" in name else parameter * 20
    settings = CacheConfig(budget=1.0, dense_when_fits=False)
    text, most = torch.randint(0, model.config.vocab_size, (1, tokens + steps)), 0.0
    with switchable(model):
        variants = make_variants(model, ("transformers", "packed", "dense", "predicted"), tokens + steps, settings)
        for variant in variants:
            read_prompt(model, variant, text[:, :tokens])
        for i in range(tokens, tokens + steps):
            wanted, *found = (step(model, variant, text[:, i : i + 1])[1] for variant in variants)
            for variant, logits in zip(variants[1:], found, strict=True):
                most = max(most, float((logits - wanted).abs().max() / wanted.abs().max()))
                if most > TOLERANCE or not torch.equal(logits.argmax(-1), wanted.argmax(-1)):
                    sys.exit(
                        f"got other logits from {variant.name} ({most:.0e}), expected those of transformers: no times taken"
                    )
        cache = variants[-1].cache
        assert isinstance(cache, TieredCache)
        if cache.stats()["total"]["sparse_steps"] != steps * model.config.num_hidden_layers:
            sys.exit("got dense steps of predicted, expected sparse ones: no times taken")
    return most


def packed(model: Any, kind: str | None) -> AbstractContextManager[object]:
    """Return a `with` block in which the weights are packed in `kind`; None: they stay as they are."""
    return nullcontext() if kind is None else pack_weights(model, kind)


def read_prompt(model: Any, variant: Variant, tokens: Tensor) -> None:
    """Have the variant's cache hold `tokens`."""
    if variant.name == "floor":
        for layer in variant.cache.layers:
            assert isinstance(layer, FloorLayer)
            layer.length = tokens.shape[1]
        return
    stock = isinstance(variant.cache, TieredCache)
    step(model, variant if stock else variant._replace(implementation="sdpa"), tokens)


def take_turns(
    variants: list[Variant], tokens: Tensor, rounds: int, steps: int, take: Callable[[Variant, Tensor], float]
) -> Times:
    """Return the times of `steps` steps of each variant in each of `rounds` rounds; the first step warms up.

    tokens [B, rounds * steps + 1]; take: one step with one token per row, [B, 1], in milliseconds.
    """
    times: Times = {variant.name: [] for variant in variants}
    coming = {variant.name: iter(tokens.split(1, 1)) for variant in variants}
    for variant in variants:
        take(variant, next(coming[variant.name]))
    for _ in range(rounds):
        for variant in variants:
            so_far = times[variant.name]
            if len(so_far) < 2 or statistics.median(x for turn in so_far for x in turn) < TOO_LONG_MS:
                so_far.append([take(variant, next(coming[variant.name])) for _ in range(steps)])
    return times


def summary(times: Times) -> dict[str, dict[str, Any]]:
    """Return median and quartiles of each variant."""
    found = {}
    for name, turns in times.items():
        taken = [ms for turn in turns for ms in turn]
        low, middle, high = statistics.quantiles(taken, n=4) if len(taken) > 1 else taken * 3
        found[name] = {"ms_per_token": round(middle, 3), "spread": [round(low, 3), round(high, 3)], "steps": len(taken)}
    return found


def ratio(times: Times, over: str, under: str) -> float:
    """Return how many times longer a step of `over` takes: median over rounds."""
    pairs = zip(times[over], times[under], strict=False)
    return round(statistics.median(statistics.median(a) / statistics.median(b) for a, b in pairs), 3)


def ratios(times: Times) -> dict[str, Any]:
    """Return the ratios that are asked for, of the variants that were run."""
    found: dict[str, Any] = {}
    dense = [name for name in DENSE if name in times]
    if "predicted" in times:
        if "floor" in times:
            found["predicted_over_floor"] = ratio(times, "predicted", "floor")
        if dense:
            best = min(dense, key=lambda name: statistics.median(x for turn in times[name] for x in turn))
            found |= {"best_dense": best, "best_dense_over_predicted": ratio(times, best, "predicted")}
        if "transformers" in times:
            found["transformers_over_predicted"] = ratio(times, "transformers", "predicted")
        if SHORT in times:
            found["growth"] = ratio(times, "predicted", SHORT)
    if "fits" in times and "packed" in times:
        found["fits_over_packed"] = ratio(times, "fits", "packed")
    return found


def free_memory() -> float:
    """Return the bytes of memory that are free; without end where that is not known."""
    file = Path("/proc/meminfo")
    lines = file.read_text(encoding="ascii").splitlines() if file.is_file() else []
    return next((float(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable")), float("inf"))


def run_demo(names: tuple[str, ...], args: argparse.Namespace) -> tuple[dict[str, Any], Times, list[Variant]]:
    """Run the demo LM on the embedded book."""
    model, tokenizer = load_model("demo")
    context = min(DEMO_CONTEXT, max(args.contexts))
    steps = args.steps or DEMO_STEPS
    text = tokenizer(demo_book(), return_tensors="pt", verbose=False)["input_ids"]
    capacity = context + args.rounds * steps + 1
    with packed(model, args.weights), switchable(model):
        variants = make_variants(model, names, capacity, settings_for(args.budget), args.policies)
        for variant in variants:
            read_prompt(model, variant, text[:, :context])
        tokens = text[:, context:capacity]
        times = take_turns(variants, tokens, args.rounds, steps, lambda *given: step(model, *given)[0])
    return {"shape": "demo", "dtype": "float32", "context": context, "layers": 5}, times, variants


def run_random(
    model: Any, shape: str, dtype: str, context: int, names: tuple[str, ...], args: argparse.Namespace
) -> tuple[dict[str, Any], Times, list[Variant]]:
    """Run a model with random weights; beside the longest context also `predicted` at the shortest (`SHORT`)."""
    steps = args.steps or 1
    capacity = context + args.rounds * steps + 1
    with packed(model, args.weights), switchable(model):
        variants = make_variants(model, names, capacity, settings_for(args.budget), args.policies)
        fill([variant.cache for variant in variants], model.config, context, DTYPES[dtype])
        if "predicted" in names and context == max(args.contexts) > min(args.contexts):
            short = make_variants(model, ("predicted",), capacity, settings_for(args.budget))[0]
            fill([short.cache], model.config, min(args.contexts), DTYPES[dtype])
            variants.append(short._replace(name=SHORT))
        tokens = torch.randint(0, model.config.vocab_size, (1, args.rounds * steps + 1))
        times = take_turns(variants, tokens, args.rounds, steps, lambda *given: step(model, *given)[0])
    layers = model.config.num_hidden_layers
    return {"shape": shape, "dtype": dtype, "context": context, "layers": layers}, times, variants


def report(
    about: dict[str, Any], times: Times, variants: list[Variant], budget: float, say: Callable[[str], None]
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Print the figures of one context; return its rows and ratios."""
    rows = []
    for variant in (one for one in variants if one.name != SHORT):
        row = about | {"variant": variant.name, "budget": budget} | summary(times)[variant.name]
        if isinstance(variant.cache, TieredCache):
            row["tokens_attended"] = variant.cache.stats()["total"]["tokens_attended"]
        low, high = row["spread"]
        say(f"  {variant.name:<13}{row['ms_per_token']:10.2f} ms ({low:.2f} to {high:.2f}), {row['steps']} steps")
        rows.append(row)
    found = ratios(times)
    say("  " + ", ".join(f"{name} {value}" for name, value in found.items()))
    return rows, {key: about[key] for key in ("shape", "dtype", "context")} | found


def growth(rows: list[dict[str, Any]], compared: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return how much longer a step takes at the longest context than at the shortest, for each variant.

    Of `predicted` both were measured in the same rounds (`paired`); others are of two runs, and memory may have drifted.
    """
    paired = {(one["shape"], one["dtype"]): one["growth"] for one in compared if "growth" in one}
    found = []
    for key in dict.fromkeys((row["shape"], row["dtype"], row["variant"]) for row in rows):
        own = {
            row["context"]: row["ms_per_token"] for row in rows if (row["shape"], row["dtype"], row["variant"]) == key
        }
        if len(own) > 1:
            shape, dtype, variant = key
            entry = {"shape": shape, "dtype": dtype, "variant": variant, "contexts": [min(own), max(own)]}
            is_paired = variant == "predicted" and key[:2] in paired
            value = paired[key[:2]] if is_paired else round(own[max(own)] / own[min(own)], 3)
            found.append(entry | {"growth": value, "paired": is_paired})
    return found


def main(arguments: list[str] | None = None) -> None:
    parser = options.Options(prog="attnpred bench decode", description=__doc__.partition("\n")[0])
    parser.add_argument("--shapes", nargs="+", choices=("demo", *SHAPES), default=["demo", "1b", "8b"])
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=["bfloat16"], help="of random models")
    parser.add_argument("--contexts", type=options.count, nargs="+", default=[4096, 16_384, 32_768, 65_536])
    parser.add_argument("--budget", type=options.budget, default=1024, help="tokens, or a share up to 1")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=VARIANTS)
    parser.add_argument("--policies", type=lambda text: text.split(","), default=[], help="further policies, by commas")
    parser.add_argument(
        "--weights",
        choices=("int8", "int4", "float"),
        default=None,
        help="pack those of linear layers, in all variants",
    )
    parser.add_argument(
        "--layers", type=options.count, default=None, help="layers of random models (8b has 2 by default)"
    )
    parser.add_argument("--rounds", type=options.count, default=12)
    parser.add_argument("--steps", type=options.count, default=None, help="steps of a variant in each round")
    parser.add_argument("--first-token", action="store_true", help="also time a first token, with and without numba")
    parser.add_argument("--out", type=Path, help="write the last line there too")
    parser.add_argument("--json", action="store_true", help="print nothing but the JSON line")
    args = parser.checked(arguments)
    args.budget = int(args.budget) if args.budget > 1 else args.budget
    say: Callable[[str], None] = (lambda line: None) if args.json else (lambda line: print(line, flush=True))
    error = check()
    say(f"check: all variants give the tokens of transformers, logits within {error:.0e}")
    rows: list[dict[str, Any]] = []
    compared: list[dict[str, Any]] = []

    def take(about: dict[str, Any], times: Times, variants: list[Variant]) -> None:
        say(
            f"{about['shape']}, {about['layers']} layers, {about['dtype']}, {about['context']:,} tokens, budget {args.budget}"
        )
        new, found = report(about, times, variants, args.budget, say)
        rows.extend(new)
        compared.append(found)

    if "demo" in args.shapes:
        take(*run_demo(tuple(args.variants), args))
    for shape in (name for name in args.shapes if name != "demo"):
        for dtype in args.dtypes:
            model = random_model(args.layers or LAYERS.get(shape), shape=shape, dtype=DTYPES[dtype])
            token, weights = row_bytes(model.config, DTYPES[dtype]), sum(x.nbytes for x in model.parameters())
            say(f"\ntheory, {shape} {dtype}: {weights:,} bytes of weights; a token's keys and values have {token:,}")
            for context in args.contexts:
                names = tuple(name for name in args.variants if name != "fits" or context == min(args.contexts))
                needed = token * context * (len(names) + len(args.policies) - ("floor" in names))
                if needed > MOST_MEMORY * free_memory():
                    print(f"left out {context:,} tokens: the caches take {needed / 2**30:.1f} GiB", file=sys.stderr)
                    continue
                take(*run_random(model, shape, dtype, context, names, args))
    found = {
        "rows": rows,
        "ratios": compared,
        "growth": growth(rows, compared),
        "budget": args.budget,
        "weights": args.weights,
        "check_logits": error,
    }
    for entry in found["growth"]:
        say(
            f"{entry['shape']} {entry['variant']:<13} {entry['growth']:.2f} times as long at {entry['contexts'][1]:,} tokens"
        )
    if args.first_token:
        from benchmarks.first_token import compare

        found["first_token_s"] = compare()
        say(f"first token: {found['first_token_s']}")
    line = json.dumps(found | environment())
    options.write_line(args, line)
    print(line)


if __name__ == "__main__":
    main()
