"""Trains a streaming predictor on traces: the projections of the digests, then the weights of forecast and correction.

The weights learn from closed loops (`attnpred.predictor.replay`): round one decodes with the starting weights, each later
round with what the round before learned, so they are trained on the histories that they themselves produce. The loss is
the cross-entropy between the true attention over the blocks that can be chosen and the softmax of the scores, and
a step counts by the attention there is to recover; so what is rewarded is recovered mass.

With `shared`, one set of weights for all layers and heads and plain mean keys: a predictor for any model.
"""

import dataclasses
import json
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from attnpred import checks
from attnpred.errors import ConfigError, TraceError
from attnpred.files import make_folder, write_text
from attnpred.predictor.block_truth import BlockTruth, block_truth
from attnpred.predictor.card import model_card
from attnpred.predictor.digest import DigestMap
from attnpred.predictor.digest_training import (
    Edges,
    LayerSample,
    Projection,
    choices,
    give_vectors,
    lost_mass,
    starting_map,
    train_projection,
)
from attnpred.predictor.predictor_config import CARD, PredictorConfig
from attnpred.predictor.pretrained import Predictor
from attnpred.predictor.replay import Step, estimates, replay
from attnpred.predictor.streaming import FEATURES, PEAKS
from attnpred.predictor.traces import TraceMeta, TraceReader, split

LOG = "train_log.jsonl"


@dataclass(frozen=True, slots=True)
class StreamingConfig:
    """Settings of a training run.

    steps: of Adam for the projections of a layer, per number of vectors. rank: r, or D where that is less. state_share:
    bytes of digests and peaks per byte of keys and values in half precision. documents: at most this many for the weights.
    rounds: closed loops. sink_blocks, recent_blocks: always attended. budgets: shares of the context that are trained for.
    history: rows of the prompt that start the state. validation: share of the documents held out. shared: see the module.
    """

    steps: int = 600
    rank: int = 32
    state_share: float = 0.0195
    documents: int = 16
    rounds: int = 2
    sink_blocks: int = 4
    recent_blocks: int = 4
    budgets: tuple[float, ...] = (1 / 4, 1 / 8, 1 / 13, 1 / 16, 1 / 32)
    history: int = 64
    validation: float = 0.2
    shared: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        least = {"rank": 2, "sink_blocks": 0, "recent_blocks": 0}
        for name in ("steps", "rank", "documents", "rounds", "history", "sink_blocks", "recent_blocks"):
            checks.whole(name, getattr(self, name), least.get(name, 1))
        checks.seed(self.seed)
        if self.rank % 2:
            raise ConfigError(f"got rank={self.rank}, expected an even number: two codes share a byte")
        if not all(0 < budget <= 1 for budget in self.budgets):
            raise ConfigError(f"got budgets={self.budgets}, expected shares above 0 and up to 1")


@dataclass(frozen=True, slots=True)
class StreamingResult:
    """What came out: held-out recovered share of the best blocks by budget, for forecast and correction; seconds."""

    forecast: dict[str, float]
    correction: dict[str, float]
    vectors: list[list[int]]
    parameters: int
    seconds: float


def train_streaming(
    traces: str | Path, out: str | Path, config: StreamingConfig | None = None, progress: bool = True
) -> StreamingResult:
    """Train on the folder `traces` into `out`."""
    config, folder, began = config or StreamingConfig(), Path(out), time.monotonic()
    reader = TraceReader(traces)
    meta = reader.meta
    edges = Edges(meta.block_size, config.sink_blocks, config.recent_blocks, meta.scale)
    config = dataclasses.replace(config, rank=min(config.rank, max(2, meta.head_dim // 2 * 2)))
    training, held_out = split(_usable(reader, config, edges), config.validation, config.seed)
    make_folder(folder)
    maps: list[DigestMap | None] = [None] * meta.layers
    if not config.shared:
        maps = [*_digest_maps(reader, training, held_out, edges, config, progress)]
    rng = random.Random(f"{config.seed}/documents")
    chosen = [_some(rng, names, config.documents) for names in (training, held_out)]
    bar = tqdm([name for names in chosen for name in names], "documents", disable=not progress)
    ready = [_Loop(reader, name, maps, edges) for name in bar]
    loops, checks = ready[: len(chosen[0])], ready[len(chosen[0]) :]
    predictor = _empty(meta, config, len(training), maps)
    network, rows = predictor.streaming, meta.layers * meta.heads
    results: dict[bool, dict[str, float]] = {}
    for correcting, table in ((False, network.forecast), (True, network.correction)):
        weights = table.detach().flatten(0, 1).clone()
        for number in range(1, config.rounds + 1):
            name = f"{'correction' if correcting else 'forecast'} {number} of {config.rounds}"
            bar = tqdm(loops, name, unit="document", disable=not progress)
            steps = [step for loop in bar for step in loop.steps(config, weights, correcting, every=8)]
            weights = fit(steps, weights, config.seed)
        if config.shared:
            weights = best_of([weights, *plain_mixtures()], loops, config, correcting)
        results[correcting] = _measured(checks, config, weights, correcting)
        with torch.no_grad():
            table.copy_(weights.view(table.shape))
    predictor.save_pretrained(folder)
    vectors = [list(found.vectors) for found in maps if found is not None]
    result = StreamingResult(
        results[False], results[True], vectors, sum(p.numel() for p in network.parameters()), time.monotonic() - began
    )
    write_text(folder / LOG, json.dumps({"config": dataclasses.asdict(config)} | dataclasses.asdict(result)) + "\n")
    write_text(
        folder / CARD, model_card(predictor.config, _details(config, result, len(training), len(held_out), rows))
    )
    return result


def fit(steps: Sequence[Step], start: Tensor, seed: int, epochs: int = 3, lr: float = 1e-2) -> Tensor:
    """Return weights [R or 1, F] that make the softmax of the scores most like the true attention; Adam from `start`."""
    weights = start.clone().requires_grad_()
    optimizer = torch.optim.Adam([weights], lr)
    rng = random.Random(seed)
    order = list(range(len(steps))) * epochs
    for i in range(epochs):
        part = order[i * len(steps) : (i + 1) * len(steps)]
        rng.shuffle(part)
        order[i * len(steps) : (i + 1) * len(steps)] = part
    for number, place in enumerate(order):
        optimizer.param_groups[0]["lr"] = lr * (1 - number / len(order))
        step = steps[place]
        shares = torch.log_softmax((step.features.float() * weights[:, None]).sum(-1), -1)
        loss = -(step.mass * shares).sum(-1).mean() / step.mass.sum(-1).mean().clamp_min(1e-9)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return weights.detach()


def plain_mixtures() -> list[Tensor]:
    """Return weights that nobody trained, [1, F]: the digest's estimate and more or less of the peaks."""
    peaks = len(PEAKS)
    shares = [2.0**i / (2**peaks - 1) for i in range(peaks)]  # the faster a peak fades, the more it tells
    return [
        torch.tensor([[1.0, *(part * share for share in shares), 0.0]], dtype=torch.float32, device="cpu")
        for part in (0.15, 0.3, 0.6, 1.2)
    ]


def best_of(
    candidates: Sequence[Tensor], loops: Sequence["_Loop"], config: StreamingConfig, correcting: bool
) -> Tensor:
    """Return the candidate whose own closed loops recover most, the mean over budgets.

    Weights for all models must not lean on what one model's heads have in common, and the cross-entropy does: it pulls the
    digest's weight down to where the softmax fits, and makes up for it with distance and peaks (docs/LOG.md).
    """
    few = loops[: max(1, len(loops) // 2)]
    found = [sum(_measured(few, config, weights, correcting).values()) for weights in candidates]
    return candidates[found.index(max(found))]


class _Loop:
    """One document, ready to be replayed."""

    def __init__(self, reader: TraceReader, name: str, maps: Sequence[DigestMap | None], edges: Edges) -> None:
        document = reader.vectors(name)
        self.edges = edges
        self.truth: BlockTruth = block_truth(document, edges.scale, edges.block_size)
        self.estimate = estimates(document, maps, edges)

    def steps(self, config: StreamingConfig, weights: Tensor, correcting: bool, every: int) -> list[Step]:
        """Return every `every`-th step of the closed loop with `weights`, features in half precision."""
        loop = replay(
            self.truth, self.estimate, self.edges, weights, config.budgets, config.history, correcting=correcting
        )
        return [Step(step.features.half(), step.mass) for number, step in enumerate(loop) if number % every == 0]


def _measured(loops: Sequence[_Loop], config: StreamingConfig, weights: Tensor, correcting: bool) -> dict[str, float]:
    """Return, by budget, the attention between sinks and recent window that was chosen, of what the best blocks hold."""
    got, best = (
        torch.zeros(len(config.budgets), dtype=torch.float32, device="cpu"),
        torch.zeros(len(config.budgets), dtype=torch.float32, device="cpu"),
    )
    for loop in loops:
        edges = loop.edges
        for step in loop.steps(config, weights, correcting, every=4):
            scores = (step.features.float() * weights[:, None]).sum(-1)
            blocks = step.mass.shape[-1] + edges.sinks + edges.recent + 1
            for i, budget in enumerate(config.budgets):
                free = max(1, int(budget * blocks) - edges.sinks - edges.recent - 1)
                chosen = scores[i].topk(min(free, scores.shape[-1]), -1).indices
                got[i] += step.mass.gather(-1, chosen).sum()
                best[i] += step.mass.topk(min(free, scores.shape[-1]), -1).values.sum()
    return {f"{budget:.4f}": round(float(share), 4) for budget, share in zip(config.budgets, got / best, strict=True)}


def _usable(reader: TraceReader, config: StreamingConfig, edges: Edges) -> list[str]:
    least = (config.sink_blocks + config.recent_blocks + 4) * edges.block_size
    names = [
        name for name in reader.documents if reader.size(name).rows > config.history and reader.size(name).first > least
    ]
    if not names:
        raise TraceError(
            f"got no document with more than {config.history} rows after {least} tokens, expected longer ones: capture more rows"
        )
    return names


def _some(rng: random.Random, names: Sequence[str], count: int) -> list[str]:
    return sorted(rng.sample(list(names), min(count, len(names))))


def _digest_maps(
    reader: TraceReader,
    training: Sequence[str],
    held_out: Sequence[str],
    edges: Edges,
    config: StreamingConfig,
    progress: bool,
) -> list[DigestMap]:
    """Return the trained maps of all layers."""
    meta = reader.meta
    counts = choices(meta.block_size)
    trained: list[list[Projection]] = []
    lost: list[Tensor] = []
    bar = tqdm(total=meta.layers * len(counts) * config.steps, desc="digests", unit="step", disable=not progress)
    for layer in range(meta.layers):
        samples = [_sample(reader, name, layer) for name in training]
        checks = [_sample(reader, name, layer) for name in held_out]
        start = starting_map(samples, config.rank)
        trained.append(
            [
                train_projection(start, samples, edges, n, config.steps, f"{config.seed}/{layer}/{n}", done=bar.update)
                for n in counts
            ]
        )
        lost.append(torch.stack([lost_mass(p, checks, edges, 1 / 13, f"{config.seed}/{layer}") for p in trained[-1]]))
    bar.close()
    kv_bytes = meta.block_size * meta.head_dim * 2 * 2
    per_head = config.state_share * kv_bytes - 4 * len(PEAKS)
    vectors = give_vectors(torch.cat(lost, 1), counts, per_head / (config.rank / 2) * meta.layers * meta.heads)
    return [
        _merged([p.as_map() for p in trained[layer]], counts, vectors[layer * meta.heads : (layer + 1) * meta.heads])
        for layer in range(meta.layers)
    ]


def _sample(reader: TraceReader, name: str, layer: int) -> LayerSample:
    document, heads = reader.vectors(name, layer), reader.meta.heads
    queries = document.queries[0]
    positions = document.first + torch.arange(queries.shape[1], device="cpu")
    return LayerSample(queries.unflatten(0, (heads, -1)), document.keys[0], positions)


def _merged(maps: Sequence[DigestMap], counts: Sequence[int], vectors: Sequence[int]) -> DigestMap:
    """Return one map that takes each head from the map trained for its number of vectors."""
    source = [counts.index(count) for count in vectors]
    keys, queries, centre = (
        torch.stack([getattr(maps[i], name)[head] for head, i in enumerate(source)])
        for name in ("keys", "queries", "centre")
    )
    return DigestMap(keys, queries, centre, tuple(vectors))


def _empty(meta: TraceMeta, config: StreamingConfig, documents: int, maps: Sequence[DigestMap | None]) -> Predictor:
    general = PredictorConfig(
        kind="streaming",
        block_size=meta.block_size,
        history=config.history,
        base_model=meta.base_model,
        trained_on=f"captured attention of {documents} documents",
    )
    own = dataclasses.replace(
        general,
        fingerprint=meta.fingerprint,
        layers=meta.layer_ids,
        heads=meta.heads,
        head_dim=meta.head_dim,
        rank=config.rank,
    )
    predictor = Predictor(general if config.shared else own)
    network = predictor.streaming
    with torch.no_grad():
        for layer, found in enumerate(maps):
            if found is not None:
                network.keys[layer], network.queries[layer] = found.keys, found.queries
                network.centre[layer], network.vectors[layer] = (
                    found.centre,
                    torch.tensor(found.vectors, dtype=torch.float32, device="cpu"),
                )
    return predictor


def _details(config: StreamingConfig, result: StreamingResult, training: int, held_out: int, rows: int) -> str:
    lines = [
        "## Training",
        "",
        f"{result.seconds:.0f} s on {training} documents, {held_out} more held out; {rows} heads, {FEATURES} weights each.",
        f"Settings: {', '.join(f'{name}={value}' for name, value in dataclasses.asdict(config).items() if name != 'budgets')}.",
        "",
        "## Measured on the held-out documents",
        "",
        "Closed loop, captured queries: attention between sinks and recent window inside the chosen blocks, as a share of",
        "what the best blocks hold, by budget (share of the context).",
        "",
        "| budget | forecast | corrected with the current query |",
        "|---|---|---|",
    ]
    lines += [
        f"| {budget} | {share:.4f} | {result.correction[budget]:.4f} |" for budget, share in result.forecast.items()
    ]
    if result.vectors:
        lines += ["", f"Vectors per block of each head, layer by layer: {result.vectors}."]
    return "\n".join(lines)
