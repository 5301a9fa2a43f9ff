"""Milliseconds of one decode step of the demo LM: floor, stock transformers, and policies on the same weights.

    python -m benchmarks.decode [--context 4096] [--steps 64] [--rounds 5]

Theory first: a dense step reads all keys and values of every layer, a sparse one its budget; the rest of the step (the
linear layers) is the same for all, and is the floor, measured by taking attention out. Variants take turns within one
process; the figure is the median over rounds, with its spread. The last line is one JSON object.
"""

import argparse
import json
import platform
import statistics
import subprocess
import time
from collections.abc import Callable

import torch
import transformers
from transformers import AttentionInterface
from transformers.cache_utils import DynamicCache

import attnpred
from attnpred.config import CacheConfig
from attnpred.evaluation.book import demo_book
from attnpred.hf import load_model

POLICIES = ("streaming", "ema", "predicted")


def no_attention(module: object, query: torch.Tensor, *args: object, **kwargs: object) -> tuple[torch.Tensor, None]:
    """Return the query in place of the attention output."""
    return query.transpose(1, 2), None


@torch.no_grad()
def steps_ms(model: torch.nn.Module, cache: object, tokens: torch.Tensor, context: int) -> float:
    """Return the median milliseconds of decode steps on a filled cache."""
    times = []
    for i in range(context, tokens.shape[1]):
        start = time.perf_counter()
        model(tokens[:, i : i + 1], past_key_values=cache, use_cache=True)
        times.append((time.perf_counter() - start) * 1e3)
    return statistics.median(times)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--context", type=int, default=4096)
    parser.add_argument("--budget", type=int, default=320)
    parser.add_argument("--steps", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", action="store_true", help="the last line is JSON in any case")
    args = parser.parse_args(arguments)
    model, tokenizer = load_model("demo")
    tokens = tokenizer(demo_book(), return_tensors="pt", verbose=False)["input_ids"][:, : args.context + args.steps]
    text = model.config
    head_dim = text.hidden_size // text.num_attention_heads
    row = 2 * text.num_hidden_layers * text.num_key_value_heads * head_dim * 4
    print(f"theory: a dense step reads {row * args.context:,} bytes of KV, a sparse one {row * args.budget:,}; fp32")
    settings = CacheConfig(
        budget=args.budget, num_sink_tokens=16, recent_window=32, dense_layers=0, calibration_interval=0
    )
    stock = text._attn_implementation
    AttentionInterface.register("benchmark_floor", no_attention)

    def fill(cache: object) -> object:
        with torch.no_grad():
            model(tokens[:, : args.context], past_key_values=cache, use_cache=True, logits_to_keep=1)
        return cache

    def floor() -> float:
        model.set_attn_implementation("benchmark_floor")
        try:
            return steps_ms(model, DynamicCache(config=text), tokens, args.context)
        finally:
            model.set_attn_implementation(stock)

    def dense() -> float:
        return steps_ms(model, fill(DynamicCache(config=text)), tokens, args.context)

    def policy(name: str) -> Callable[[], float]:
        def run() -> float:
            with attnpred.attach(model, policy=name, config=settings) as attached:
                return steps_ms(model, fill(attached.new_cache()), tokens, args.context)

        return run

    variants = {"floor": floor, "transformers": dense, "full": policy("full")} | {
        name: policy(name) for name in POLICIES
    }
    times: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(args.rounds):
        for name, run in variants.items():
            times[name].append(run())
    rows = []
    for name, values in times.items():
        median = statistics.median(values)
        rows.append(
            {"shape": "demo", "dtype": "float32", "context": args.context, "variant": name, "ms_per_token": median}
        )
        low, high = min(values), max(values)
        ratio = median / statistics.median(times["transformers"])
        print(f"{name:<14}{median:8.2f} ms ({low:.2f} to {high:.2f}), {ratio:.2f} of transformers")
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    ).stdout.strip()
    versions = {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }
    print(
        json.dumps(
            {"rows": rows, "budget": args.budget, "threads": torch.get_num_threads(), "commit": commit} | versions
        )
    )


if __name__ == "__main__":
    main()
