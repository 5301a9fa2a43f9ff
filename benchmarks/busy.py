"""A token while other programs want the cores: beside one and two processes that spin, over the same at rest.

    python -m benchmarks.busy [--context 4096] [--weights int8 none] [--rounds 6] [--steps 8] [--out docs/results/busy.json]

Theory first. With as many threads as cores, and as many others that spin, each gets half of a core: a token should take
twice as long. It takes far longer where a thread waits for another one that does not run just then. So at rest and busy take
turns in one process; the processes that spin are started for each turn, and ended after it. The cache of SmolLM2 holds
random keys. Run it on a machine at rest, or the figures say nothing; `load` says what it was. Figures are medians. The last
line is one JSON object.
"""

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

import attnpred
from attnpred.config import CacheConfig
from attnpred.hf import cache_argument, load_model
from benchmarks import options
from benchmarks.environment import environment
from benchmarks.models import fill

BUDGET = 1 / 13


@contextmanager
def spinning(count: int) -> Iterator[None]:
    """Have so many processes spin while this lasts."""
    others = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        time.sleep(0.2 * bool(count))  # they have begun by then
        yield
    finally:
        for other in others:
            other.kill()
            other.wait()


@torch.no_grad()
def tokens(model: Any, cache: Any, steps: int) -> list[float]:
    """Return milliseconds of each of `steps` tokens after a first one."""
    taken = []
    for _ in range(steps + 1):
        began = time.perf_counter()
        int(model(torch.tensor([[7]]), **cache_argument(cache), use_cache=True, logits_to_keep=1).logits.argmax())
        taken.append((time.perf_counter() - began) * 1e3)
    return taken[1:]


def measure(
    model: Any, weights: str, context: int, busy: tuple[int, ...], rounds: int, steps: int
) -> list[dict[str, Any]]:
    """Return a row for each number of processes that spin."""
    found: dict[int, list[float]] = {count: [] for count in busy}
    packed = None if weights == "none" else weights
    with attnpred.attach(model, config=CacheConfig(budget=BUDGET), weights=packed) as attached:
        cache = attached.new_cache()
        fill([cache], model.config, context, torch.float32)
        tokens(model, cache, 3)
        for _ in range(rounds):
            for count, taken in found.items():
                with spinning(count):
                    taken += tokens(model, cache, steps)
    rest = statistics.median(found[busy[0]])
    return [
        {"weights": weights, "context": context, "busy": count, "ms_per_token": round(statistics.median(taken), 2)}
        | {"worst_ms": round(max(taken), 2), "over_rest": round(statistics.median(taken) / rest, 2)}
        for count, taken in found.items()
    ]


def main(arguments: list[str] | None = None) -> None:
    parser = options.Options(prog="python -m benchmarks.busy", description=__doc__.partition("\n")[0])
    parser.add_argument("--context", type=options.count, default=4096)
    parser.add_argument("--weights", nargs="+", choices=("none", "float", "int8", "int4"), default=["int8", "none"])
    parser.add_argument("--rounds", type=options.count, default=6)
    parser.add_argument("--steps", type=options.count, default=8, help="tokens in each round")
    parser.add_argument("--threads", type=options.count, default=None, help="left out: as many as torch has")
    parser.add_argument("--out", type=Path, help="write the last line there too")
    parser.add_argument("--json", action="store_true", help="print nothing but the JSON line")
    args = parser.checked(arguments)
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    model, _ = load_model("smollm2", device="cpu", dtype=torch.float32)
    rows, load = [], os.getloadavg()[0]
    for weights in args.weights:
        for row in measure(model, weights, args.context, (0, 1, 2), args.rounds, args.steps):
            rows.append(row)
            if not args.json:
                print(
                    f"{weights:>5}, {row['busy']} spin: {row['ms_per_token']:7.1f} ms a token, {row['over_rest']:.2f} of rest, "
                    f"worst {row['worst_ms']:.1f}",
                    flush=True,
                )
    waits = {name: os.environ.get(name) for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")}
    line = json.dumps({"rows": rows, "waits": waits} | environment() | {"load": round(load, 2)})
    options.write_line(args, line)
    print(line)


if __name__ == "__main__":
    main()
