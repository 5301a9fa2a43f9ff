"""A prompt and a token, ours and those of what else a laptop's user would take: llama.cpp, and transformers as it comes.

    attnpred bench rivals [--contexts 1024 4096 8192 16384] [--weights none float int8 int4] [--kv f16 q8_0] [--json]

Theory first. A token costs the time in which its bytes come from memory: all weights, and the keys and values that are
read. SmolLM2 has 540 MB of weights in fp32, 143 in int8 and 96 in int4, Q8_0 and Q4_1 about as many; keys and values of
8,192 tokens have 377 MB in fp32, 189 in f16 and 100 in q8_0. `predicted` reads a thirteenth: its token should not grow.

    attnpred       policy `predicted` at a budget of 1/13, weights as they are (fp32: by torch; float: by our own kernels),
                   int8 and int4; keys and values in fp32
    transformers   DynamicCache and SDPA, as `generate` has them by default
    llama.cpp      weights Q8_0 and Q4_1 of the same file, keys and values in f16 and q8_0, flash attention (`xllamacpp`)

All run in one process, with as many threads. Each reads the prompt, then engines take turns, a few tokens each. llama.cpp
has a clock of its own in its server; ours is that of one call of the model. Before any time is taken, the next token after a
short prompt has to be the same for both with fp32 weights; `next_tokens` has those of the others. Figures are medians with
quartiles; a prompt is read once. `load` is what the machine did besides, at the begin and the end of a context. The last
line is one JSON object.
"""

import argparse
import copy
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from transformers import DynamicCache

import attnpred
from attnpred.config import CacheConfig
from attnpred.evaluation.book import demo_book
from attnpred.hf import cache_argument, load_model
from attnpred.hf.named_models import NAMED_MODELS
from benchmarks import options
from benchmarks.environment import environment
from benchmarks.llama_cpp import KV, LlamaCpp

BUDGET = 1 / 13
SHORT = 200
"""Tokens of the check."""
LLAMA = {"int8": "Q8_0", "int4": "Q4_1"}
"""llama.cpp's weights beside ours."""


class Engine(Protocol):
    """What is measured: milliseconds of a prompt, and of each token after it."""

    def read(self, ids: Sequence[int]) -> float: ...
    def decode(self, ids: Sequence[int], steps: int) -> float: ...
    def likeliest(self, ids: Sequence[int]) -> int: ...


class Ours:
    """A model, attached with `weights` in so many bits, or stock transformers (`is_stock`)."""

    def __init__(self, model: Any, weights: str | None, *, is_stock: bool = False) -> None:
        shared: dict[int, Any] = {id(x): x for x in (*model.parameters(), *model.buffers())}
        self.model = copy.deepcopy(model, shared)  # of its own, but for the numbers
        settings = CacheConfig(budget=BUDGET)
        self.attached = None if is_stock else attnpred.attach(self.model, config=settings, weights=weights)
        self.cache: Any = None

    @torch.no_grad()
    def _step(self, ids: Sequence[int]) -> tuple[float, int]:
        tokens, began = torch.tensor([list(ids)]), time.perf_counter()
        logits = self.model(tokens, **cache_argument(self.cache), use_cache=True, logits_to_keep=1).logits
        token = int(logits[0, -1].argmax())
        return (time.perf_counter() - began) * 1e3, token

    def read(self, ids: Sequence[int]) -> float:
        self.cache = DynamicCache(config=self.model.config) if self.attached is None else self.attached.new_cache()
        spent, self.next = self._step(ids)
        return spent

    def decode(self, ids: Sequence[int], steps: int) -> float:
        """Go on; what was generated before stays: some tokens more."""
        spent = 0.0
        for _ in range(steps):
            taken, self.next = self._step([self.next])
            spent += taken
        return spent / steps

    def likeliest(self, ids: Sequence[int]) -> int:
        self.read(ids)
        return self.next


def engines(name: str, args: argparse.Namespace) -> dict[tuple[str, str, str], Callable[[], Engine]]:
    """Return what makes each engine, by engine, weights and type of keys and values."""
    model, _ = load_model(name, device="cpu", dtype=torch.float32)
    room, threads = max(args.contexts) + 64, torch.get_num_threads()
    made: dict[tuple[str, str, str], Callable[[], Engine]] = {}
    for weights in args.weights:
        packed = None if weights == "none" else weights
        made["attnpred", packed or "fp32", "fp32"] = lambda packed=packed: Ours(model, packed)  # type: ignore[misc]
    if "transformers" in args.engines:
        made["transformers", "fp32", "fp32"] = lambda: Ours(model, None, is_stock=True)
    for weights in (LLAMA[word] for word in args.weights if word in LLAMA and "llama.cpp" in args.engines):
        for kv in args.kv:
            made["llama.cpp", weights, kv] = lambda weights=weights, kv=kv: LlamaCpp(name, weights, kv, room, threads)  # type: ignore[misc]
    return made


def check(made: dict[tuple[str, str, str], Engine], ids: Sequence[int]) -> dict[str, int]:
    """Return the next token of each engine; end the run if those with the weights as they are differ."""
    found = {"/".join(key): engine.likeliest(ids) for key, engine in made.items()}
    exact = {found["/".join(key)] for key in made if key[1] == "fp32"}
    if len(exact) > 1:
        sys.exit(f"got different next tokens from fp32 weights ({found}), expected one: no times taken")
    return found


def measure(
    name: str, made: dict[tuple[str, str, str], Engine], ids: Sequence[int], args: argparse.Namespace
) -> list[dict[str, Any]]:
    """Return a row for each engine after the prompt `ids`."""
    loads, prompts = [os.getloadavg()[0]], {}
    times: dict[tuple[str, str, str], list[float]] = {key: [] for key in made}
    for key, engine in made.items():
        prompts[key] = engine.read(ids)
        print(f"  {'/'.join(key)}: prompt {prompts[key] / 1e3:.1f} s", file=sys.stderr, flush=True)
    for turn in range(args.rounds + 1):
        for key, engine in made.items():
            taken = engine.decode(ids, args.steps)
            times[key] += [taken] if turn else []  # the first warms up
    loads.append(os.getloadavg()[0])
    rows = []
    for (engine_name, weights, kv), taken in times.items():
        low, middle, high = statistics.quantiles(taken, n=4) if len(taken) > 1 else taken * 3
        rows.append(
            {"model": name, "context": len(ids), "engine": engine_name, "weights": weights, "kv": kv}
            | {"ms_per_token": round(middle, 2), "spread": [round(low, 2), round(high, 2)]}
            | {"prompt_ms": round(prompts[engine_name, weights, kv], 1), "load": [round(load, 1) for load in loads]}
        )
    return rows


def main(arguments: list[str] | None = None) -> None:
    parser = options.Options(prog="attnpred bench rivals", description=__doc__.partition("\n")[0])
    parser.add_argument("--model", choices=tuple(NAMED_MODELS), default="smollm2", help="a GGUF file that has a name")
    parser.add_argument("--contexts", type=options.count, nargs="+", default=[1024, 2048, 4096, 8192, 16384])
    parser.add_argument(
        "--engines", nargs="+", choices=("transformers", "llama.cpp"), default=["transformers", "llama.cpp"]
    )
    parser.add_argument("--weights", nargs="+", choices=("none", "float", *LLAMA), default=["none", "float", *LLAMA])
    parser.add_argument("--kv", nargs="+", choices=KV, default=list(KV), help="of llama.cpp")
    parser.add_argument(
        "--threads", type=options.count, default=None, help="of each engine; left out: as many as torch has"
    )
    parser.add_argument("--rounds", type=options.count, default=8)
    parser.add_argument("--steps", type=options.count, default=8, help="tokens of an engine in each round")
    parser.add_argument("--out", type=Path, help="write the last line there too")
    parser.add_argument("--json", action="store_true", help="print nothing but the JSON line")
    args = parser.checked(arguments)
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    _, tokenizer = load_model(args.model, device="cpu", dtype=torch.float32)
    ids = tokenizer(demo_book(), verbose=False)["input_ids"]
    while len(ids) < max(args.contexts):
        ids = ids + ids
    made = {key: make() for key, make in engines(args.model, args).items()}
    found: dict[str, Any] = {"next_tokens": check(made, ids[:SHORT]), "budget": BUDGET, "rows": []}
    for context in args.contexts:
        for row in measure(args.model, made, ids[:context], args):
            found["rows"].append(row)
            if not args.json:
                low, high = row["spread"]
                print(
                    f"{context:7,} {row['engine']:<12} {row['weights']:>4} {row['kv']:>4}: prompt {row['prompt_ms'] / 1e3:6.1f} s, "
                    f"{row['ms_per_token']:7.1f} ms a token ({low:.1f} to {high:.1f}), load {row['load']}",
                    flush=True,
                )
    line = json.dumps(found | environment())
    options.write_line(args, line)
    print(line)


if __name__ == "__main__":
    main()
