"""What a cache really takes of the process's memory, against its own count and against the estimate.

    python -m benchmarks.memory [--context 32768] [--budget 0.0769] [--offload disk|cpu|none]

The 1B shape's cache is filled with random keys and values, 1,024 tokens at a time, as a prompt in chunks would; then come
steps of `predicted`, without the weights of a model: what the process has more than before is the cache. The last line is
JSON.
"""

import ctypes
import json
import resource
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from attnpred.config import CacheConfig
from attnpred.dense_calls import seal
from attnpred.hf import TieredCache
from attnpred.hf.sizes import estimate_for
from attnpred.kernels.dense import AttentionTerms
from attnpred.policies.predicted import Predicted
from benchmarks import options
from benchmarks.environment import environment
from benchmarks.models import SHAPE_1B

CHUNK = 1024


def resident() -> int:
    """Return the bytes of memory that the process has now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


@torch.no_grad()
def run(cache: TieredCache, context: int, steps: int) -> int:
    """Fill `cache` to `context` tokens and take `steps`; return the most memory the process had, in bytes."""
    config: Any = cache.model_config
    heads, group, dim = (
        config.num_key_value_heads,
        config.num_attention_heads // config.num_key_value_heads,
        config.head_dim,
    )
    terms, most = AttentionTerms(dim**-0.5), 0
    for start in range(0, context + steps, CHUNK):
        chunks = [CHUNK] if start < context else [1] * steps
        for tokens in chunks:
            for index, layer in enumerate(cache.layers):
                store = layer.store  # type: ignore[attr-defined]
                keys, values = (torch.randn(1, heads, tokens, dim).bfloat16() for _ in range(2))
                query = torch.randn(1, heads * group, tokens, dim).bfloat16()
                store.append(keys, values)
                decoder = cache.decoder(index)
                if tokens == 1:
                    decoder.step(query[:, :, 0], store, terms, None)
                elif start + tokens >= context:
                    decoder.observe(query[:, :, -64:], store, terms, None, prompt=True)
                else:  # as `observe` does, but without the rows, which would read everything for every chunk
                    seal(decoder.memory, store)
                del keys, values, query
                most = max(most, resident())
    return most


def main(arguments: list[str] | None = None) -> None:
    parser = options.Options(prog="attnpred bench memory", description=__doc__.partition("\n")[0])
    parser.add_argument("--context", type=options.count, default=1 << 15)
    parser.add_argument("--budget", type=options.budget, default=1 / 13)
    parser.add_argument("--steps", type=options.count, default=8)
    parser.add_argument("--offload", choices=("none", "cpu", "disk"), default="disk")
    parser.add_argument("--folder", type=Path, default=None)
    parser.add_argument("--json", action="store_true", help="the last line is JSON in any case")
    args = parser.checked(arguments)
    ctypes.CDLL(None).mallopt(-3, 1 << 16)  # M_MMAP_THRESHOLD: what is freed goes back to the system at once
    settings = CacheConfig(budget=args.budget, late_share=0.05)
    if args.offload != "none":
        settings = replace(settings, offload=args.offload, offload_dir=args.folder if args.offload == "disk" else None)
    policy = Predicted()
    wanted = estimate_for(SHAPE_1B, settings, policy, torch.bfloat16, args.context)
    run(TieredCache(SHAPE_1B, policy=policy, config=replace(settings, budget=1024)), 2 * CHUNK, 2)  # loads all code
    before = resident()
    cache = TieredCache(SHAPE_1B, policy=policy, config=settings)
    peak = run(cache, args.context, args.steps) - before
    found = {
        "context": args.context,
        "offload": args.offload,
        "estimate": wanted.fast,
        "process": peak,
        "counted": cache.fast_bytes(),
        "process_over_estimate": peak / wanted.fast,
        "counted_over_estimate": cache.fast_bytes() / wanted.fast,
        "full_over_process": wanted.full / peak,
    }
    cache.close()
    for name, value in found.items():
        print(
            f"{name:<24}{value:,.3f}"
            if isinstance(value, float)
            else f"{name:<24}{value:,}"
            if isinstance(value, int)
            else f"{name:<24}{value}"
        )
    print(json.dumps(found | {"parts": wanted.as_dict()} | environment()))


if __name__ == "__main__":
    main()
