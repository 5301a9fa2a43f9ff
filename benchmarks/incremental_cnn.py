"""Milliseconds of one forecast of one layer: the whole network, and `IncrementalCNN` with and without padding in time.

    python -m benchmarks.incremental_cnn [--blocks 256 1024 2048] [--heads 8] [--history 64] [--steps 48] [--layers 8]

Theory first: one row of features is 9.6 kFLOP per block and head; the whole network computes H of them, the padded state
five, the unpadded one one. A step pushes a row and scores; the layers take turns, so each finds its rows and
contributions as cold as in a decode step, and the variants take turns as well. Every 16 steps the zone grows by a
block, and the columns at its end are computed over all rows: `ms` is the median of the other steps, `ms_growth` of these,
`ms_mean` the mean of all. The last line is one JSON object.
"""

import argparse
import json
import platform
import statistics
import subprocess
import time

import torch

from attnpred.predictor.cnn import PaperCNN, UnpaddedCNN
from attnpred.predictor.history import History
from attnpred.predictor.incremental import IncrementalCNN

BLOCK = 16
SINKS, RECENT = 1, 4  # blocks that the network does not see


def states(variant: str, history: int, layers: int) -> list[IncrementalCNN]:
    """Return one state per layer, over one network."""
    network = UnpaddedCNN() if variant == "unpadded" else PaperCNN()
    return [IncrementalCNN(network, history) for _ in range(layers)]


@torch.no_grad()
def full(network: PaperCNN, rows: History, first: int, last: int) -> torch.Tensor:
    """Return the scores as the whole network computes them."""
    return network(rows.ordered()[..., first:last].flatten(0, 1))


def measure(blocks: int, heads: int, history: int, steps: int, layers: int) -> list[dict[str, str | int | float]]:
    """Return one row per variant."""
    torch.manual_seed(0)
    variants = {name: states(name, history, layers) for name in ("full", "padded", "unpadded")}
    columns = blocks + SINKS + RECENT
    times: dict[str, list[tuple[bool, float]]] = {name: [] for name in variants}
    for layer in range(layers):
        prompt = torch.rand(1, heads, history, columns)
        for name, of_layers in variants.items():
            of_layers[layer].push(prompt)
            if name != "full":
                of_layers[layer].scores(SINKS, columns - RECENT)
    for step in range(1, steps + 1):
        grows = step % BLOCK == 0
        columns += grows
        for name, of_layers in variants.items():
            if name == "full" and step > 4:
                continue  # it takes long, and growth means nothing to it
            for state in of_layers:
                row = torch.rand(1, heads, 1, columns)
                start = time.perf_counter()
                state.push(row)
                if name == "full":
                    full(state.network, state.history, SINKS, columns - RECENT)
                else:
                    state.scores(SINKS, columns - RECENT)
                times[name].append((grows, (time.perf_counter() - start) * 1e3))
    rows = []
    for name, taken in times.items():
        plain, growing = [ms for grew, ms in taken if not grew], [ms for grew, ms in taken if grew]
        figures = {"ms": statistics.median(plain), "ms_growth": statistics.median(growing or plain)}
        figures["ms_mean"] = statistics.mean(ms for _, ms in taken)
        assert all(state.rebuilds == (name != "full") for state in variants[name])
        text = ", ".join(f"{key} {value:8.2f}" for key, value in figures.items())
        print(f"{blocks:>6} blocks  {name:<9} {text}, from {min(plain):.2f} to {max(plain):.2f}", flush=True)
        rows.append({"blocks": blocks, "heads": heads, "history": history, "variant": name, **figures})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, nargs="+", default=[256, 1024, 2048])
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--history", type=int, default=64)
    parser.add_argument("--steps", type=int, default=48)
    parser.add_argument("--layers", type=int, default=8)
    args = parser.parse_args()
    if args.steps < 1:
        parser.error("got no steps, expected at least 1")
    print(
        f"theory: {args.history}, 5 and 1 rows of features, {2 * (9 * 16 + 9 * 16 * 32 + 32) / 1e3:.1f} kFLOP per block"
    )
    rows = [row for blocks in args.blocks for row in measure(blocks, args.heads, args.history, args.steps, args.layers)]
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    ).stdout.strip()
    versions = {"torch": torch.__version__, "python": platform.python_version()}
    print(json.dumps({"rows": rows, "threads": torch.get_num_threads(), "commit": commit} | versions))


if __name__ == "__main__":
    main()
