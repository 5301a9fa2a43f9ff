"""Tokens a second at several rows at once: prompts of their own, or one prompt for all.

    attnpred bench batches [--batches 1 4 16] [--context 8192] [--layers 8] [--budget 1024] [--rounds 6] [--json]

Theory first. The weights are read once for all rows, the keys and values of each row for itself: so attention is a larger
part of a step than with one row, and what a budget saves grows with the batch, up to the ratio of the bytes of cache read.

    separate   rows of different lengths, from half of the context to all of it, padded on the left, with a mask
    shared     one prompt, its cache repeated for all rows (`batch_repeat_interleave`, as for several answers to one
               question); `repeat_ms` is what that takes, once

The 1B shape with random weights, in bf16; half of its layers, for 16 rows of 8,192 tokens have 2 GiB of keys and values in
each cache even so. Variants are those of `attnpred bench decode` and take turns; a step of more than 3 s is taken twice.
The last line is one JSON object.
"""

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import options
from benchmarks.baselines import Variant, make_variants, step, switchable
from benchmarks.decode import check, settings_for, summary, take_turns
from benchmarks.environment import environment
from benchmarks.models import SHAPES, fill, random_model, row_bytes

KINDS = ("separate", "shared")
VARIANTS = ("floor", "transformers", "packed", "dense", "predicted")


def ragged(batch: int, context: int) -> Tensor:
    """Return how many tokens of padding each row has: none to half of the context, in equal steps."""
    return torch.linspace(0, context // 2, batch).long() if batch > 1 else torch.zeros(1, dtype=torch.long)


@torch.no_grad()
def measure(model: Any, batch: int, kind: str, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Return a row for every variant."""
    config, context = model.config, args.context
    capacity = context + args.rounds + 1
    padding = ragged(batch, context) if kind == "separate" else torch.zeros(batch, dtype=torch.long)
    mask = (torch.arange(capacity) >= padding[:, None]).long()
    repeat_ms: dict[str, float] = {}
    with switchable(model):
        variants = make_variants(model, args.variants, capacity, settings_for(args.budget))
        if kind == "separate":
            fill([variant.cache for variant in variants], config, context, padding=padding)
        else:
            fill([variant.cache for variant in variants], config, context)
            for variant in variants:
                began = time.perf_counter()
                variant.cache.batch_repeat_interleave(batch)
                repeat_ms[variant.name] = round((time.perf_counter() - began) * 1e3, 3)
        tokens = torch.randint(0, config.vocab_size, (batch, args.rounds + 1))

        def take(variant: Variant, token: Tensor) -> float:
            length = variant.cache.get_seq_length() + 1
            extra = {} if kind == "shared" or batch == 1 else {"attention_mask": mask[:, :length]}
            if extra:  # as `generate` counts them
                extra["position_ids"] = (length - 1 - padding)[:, None]
            return step(model, variant, token, **extra)[0]

        times = take_turns(variants, tokens, args.rounds, 1, take)
    tokens_held = int((context - padding).sum())
    return [
        {"batch": batch, "kind": kind, "variant": name, "context": context, "layers": config.num_hidden_layers}
        | {"tokens_held": tokens_held, "budget": args.budget}
        | {"tokens_per_s": round(batch * 1e3 / figures["ms_per_token"], 2), "ms_per_step": figures["ms_per_token"]}
        | {"spread": figures["spread"], "steps": figures["steps"]}
        | ({"repeat_ms": repeat_ms[name]} if repeat_ms else {})
        for name, figures in summary(times).items()
    ]


def main(arguments: list[str] | None = None) -> None:
    parser = options.Options(prog="attnpred bench batches", description=__doc__.partition("\n")[0])
    parser.add_argument("--batches", type=options.count, nargs="+", default=[1, 4, 16])
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS)
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=VARIANTS)
    parser.add_argument("--context", type=options.count, default=8192)
    parser.add_argument("--shape", choices=SHAPES, default="1b")
    parser.add_argument("--layers", type=options.count, default=8)
    parser.add_argument("--budget", type=options.count, default=1024)
    parser.add_argument("--rounds", type=options.count, default=6)
    parser.add_argument("--out", type=Path, help="write the last line there too")
    parser.add_argument("--json", action="store_true", help="print nothing but the JSON line")
    args = parser.checked(arguments)
    say: Callable[[str], None] = (lambda line: None) if args.json else (lambda line: print(line, flush=True))
    error = check()
    model, rows = random_model(args.layers, shape=args.shape), []
    token, weights = row_bytes(model.config, torch.bfloat16), sum(x.nbytes for x in model.parameters())
    say(f"theory: {weights:,} bytes of weights, once for all rows; {token:,} for each token that a row attends to")
    for batch in args.batches:
        for kind in args.kinds:
            new = measure(model, batch, kind, args)
            say(f"{batch} rows, {kind}, {new[0]['tokens_held']:,} tokens in all")
            for row in new:
                say(f"  {row['variant']:<13}{row['tokens_per_s']:9.1f} tokens/s {row['ms_per_step']:10.1f} ms a step")
            rows += new
    line = json.dumps({"rows": rows, "shape": args.shape, "dtype": "bfloat16", "check_logits": error} | environment())
    options.write_line(args, line)
    print(line)


if __name__ == "__main__":
    main()
