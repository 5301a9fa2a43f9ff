"""What choosing costs: one selection per layer and step against the sparse attention call that it serves.

Run `python -m benchmarks.selection`; the last line is one JSON object. A selection is all that a step does besides
attending: score the digests with the query, forecast or correct, take the best blocks, remember the row. Attention is
`sparse_decode` over 1,024 tokens per kv head, in blocks of the variant's own size: 4 tokens for `predicted`, 16 for the
others and for `predicted, blocks of 16`. Shape of an 8B model: 32 query heads, 8 kv heads, D = 128.

Theory, 8 kv heads: codes of `predicted` take 3 D / 64 bytes a token, 6 MB at 128K tokens (D / 32 and 4 MB with blocks of
16); for each block 4 bytes of past are read twice and written once, and 4 of estimate and score a few times, 1 MB each with
blocks of 4. `floor`, the time that reading as many bytes takes in one sum, is what no program can beat. The products are
3 D / 8 multiplications per block of 4 and query head, and a power of two.

`predicted, torch only` is the same without numba.

Layers take turns, so that no data is in a cache from the step before, and attention gets fresh random blocks in every call.
Variants are interleaved; figures are medians with the quartiles.
"""

import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from attnpred import kernels
from attnpred.config import CacheConfig
from attnpred.decode import LayerDecoder
from attnpred.dense_calls import seal
from attnpred.policies import Ema, Predicted, Quest
from attnpred.policies.base import Policy, View
from attnpred.policies.paper_cnn import PaperForecast
from attnpred.policies.select import Zone, select_blocks, zone_at
from attnpred.predictor.predictor_config import PredictorConfig
from attnpred.predictor.pretrained import Predictor
from attnpred.store.pool import BlockPool
from attnpred.telemetry import LayerCounts
from benchmarks import options
from benchmarks.environment import environment

HEADS, KV_HEADS, DIM, BLOCK, BUDGET, LAYERS = 32, 8, 128, 16, 1024, 3
CONTEXTS = (4096, 16384, 32768, 65536, 131072)
CNN_UP_TO = 16384


def policies() -> dict[str, Policy[Any]]:
    """Return the policies by name."""
    return {
        "predicted": Predicted(),
        "predicted, blocks of 16": Predicted(),
        "predicted, torch only": Predicted(),
        "ema": Ema(),
        "quest": Quest(),
        "cnn": PaperForecast(Predictor(PredictorConfig(kind="cnn"))),
    }


class Layer:
    """One layer with a full cache, and a decoder of every policy."""

    def __init__(self, context: int, chosen: dict[str, Policy[Any]]) -> None:
        keys = torch.randn(1, KV_HEADS, context, DIM, dtype=torch.bfloat16)
        self.decoders: dict[str, LayerDecoder] = {}
        self.zones: dict[str, Zone] = {}
        for name, policy in chosen.items():
            size = BLOCK if name.endswith("of 16") else policy.granularity
            settings = CacheConfig(budget=BUDGET, block_size=size, calibration_interval=0)
            self.pool, zone = BlockPool(size), zone_at(settings, context)
            self.pool.append(keys, keys)
            decoder = LayerDecoder(settings, policy, LayerCounts())
            rows = torch.rand(1, KV_HEADS, settings.history, zone.blocks) ** 8
            decoder.memory.meet(torch.randn(1, HEADS, decoder.memory.rows or 1, DIM), DIM**-0.5)
            seal(decoder.memory, self.pool)
            decoder.memory.push(rows[:, :, -decoder.memory.rows :])
            self.decoders[name], self.zones[name] = decoder, zone
        self.codes = torch.ones(self.decoders["predicted"].memory.bytes() // 8, dtype=torch.int64)  # as many bytes

    def choose(self, name: str, query: Tensor, maxima: Tensor) -> Tensor:
        """Return a selection, as one step would: everything but attention."""
        if name == "floor":
            return self.codes.sum()
        use_backend("torch" if name.endswith("torch only") else kernels.DIGEST)
        decoder = self.decoders[name]
        decoder.memory.look(query, DIM**-0.5, KV_HEADS)
        view = View(decoder.memory, self.zones[name], 0, True)
        selection = decoder.policy.choose(view)
        selection = select_blocks(decoder.policy.score(view), view.zone) if selection is None else selection
        if decoder.memory.rows:
            decoder.memory.push_attended(selection, maxima, view.zone.blocks)
        return selection

    def attend(self, name: str, query: Tensor) -> Tensor:
        """Attend to random blocks of the size that `name` has."""
        size = self.decoders[name].config.block_size
        selection = torch.rand(1, KV_HEADS, self.zones[name].blocks).topk(BUDGET // size, -1).indices
        began = time.perf_counter()
        kernels.sparse_decode(
            query.bfloat16(), self.pool.keys, self.pool.values, selection, self.pool.length,
            block_size=size, scale=DIM**-0.5,
        )  # fmt: skip
        self.attention_time = time.perf_counter() - began
        return selection


def use_backend(name: str) -> None:
    """Have the kernels of one backend called, by the tables of `attnpred.kernels`."""
    kernels.has_native_selection = lambda tensor: name == "numba"
    kernels.digest_shares = kernels.DIGEST_BACKENDS[name]
    for function, found in kernels.STREAM_BACKENDS[name].items():
        setattr(kernels, function, found)


def timed(call: Callable[[], object]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


@torch.no_grad()
def measure(context: int, rounds: int, only: list[str] | None = None) -> list[dict[str, Any]]:
    """Return a row for every variant at `context` tokens."""
    chosen = {name: policy for name, policy in policies().items() if name != "cnn" or context <= CNN_UP_TO}
    chosen = {name: policy for name, policy in chosen.items() if not only or name in ("predicted", *only)}
    layers = [Layer(context, chosen) for _ in range(LAYERS)]
    names = (*chosen, "floor")
    times: dict[str, list[float]] = {name: [] for name in names}
    attending: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(rounds + 3):
        for name in names:
            as_ = "predicted" if name == "floor" else name
            zone = layers[0].zones[as_]
            size = zone.sinks + zone.free + zone.blocks - zone.first_recent
            for layer in layers:
                query, maxima = torch.randn(1, HEADS, DIM), torch.rand(1, KV_HEADS, size)
                spent = timed(lambda: layer.choose(name, query, maxima))  # noqa: B023 (called at once)
                layer.attend(as_, query)
                if turn >= 3:
                    times[name].append(spent)
                    attending[name].append(layer.attention_time)
    rows = []
    for name in names:
        low, middle, high = (x * 1e6 for x in statistics.quantiles(times[name], n=4))
        state = layers[0].decoders["predicted" if name == "floor" else name].memory.bytes() / layers[0].pool.bytes()
        rows.append(
            {
                "context": context,
                "kv_heads": KV_HEADS,
                "variant": name,
                "us": round(middle, 1),
                "quartiles": [round(low, 1), round(high, 1)],
                "attention_us": round(statistics.median(attending[name]) * 1e6, 1),
                "state_share": round(state, 4),
            }
        )
    return rows


def main(arguments: list[str] | None = None) -> None:
    parser = options.Options(prog="attnpred bench selection", description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=options.count, default=15)
    parser.add_argument("--contexts", type=options.count, nargs="*", default=CONTEXTS)
    parser.add_argument("--out", type=Path, help="Write the last line there too.")
    parser.add_argument("--variants", nargs="*", help="Only these.")
    parser.add_argument("--json", action="store_true", help="the last line is JSON in any case")
    args = parser.checked(arguments)
    rows: list[dict[str, Any]] = []
    for context in args.contexts:
        for row in measure(context, args.rounds, args.variants):
            print(
                f"{row['context']:7d} {row['variant']:22} {row['us']:9.0f} us  attention {row['attention_us']:7.0f} us"
            )
            rows.append(row)
    found = json.dumps({**environment(), "kernels": kernels.DIGEST, "rows": rows})
    options.write_line(args, found)
    print(found)


if __name__ == "__main__":
    main()
