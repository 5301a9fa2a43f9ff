"""Trains a SeerAttention-R gate on traces, a layer at a time (`attnpred.predictor.seer_fitting`); the model stays as it is.

What is measured on held-out documents is what the gate is for: attention inside the blocks that it chooses, as a share of
what the best ones hold.
"""

import dataclasses
import json
import math
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
from attnpred.predictor.block_truth import block_truth
from attnpred.predictor.card import model_card
from attnpred.predictor.edges import Edges
from attnpred.predictor.predictor_config import CARD, PredictorConfig
from attnpred.predictor.pretrained import Predictor
from attnpred.predictor.seer_fitting import LOG_EVERY, GateSample, gate_loss, measured, train_gate
from attnpred.predictor.seer_gate import GateMap, pooled
from attnpred.predictor.traces import TraceMeta, TraceReader, split

LOG = "train_log.jsonl"


@dataclass(frozen=True, slots=True)
class SeerConfig:
    """Settings of a training run.

    steps: of Adam, for each layer. rank: r. queries: of one document, per step. lr: of Adam at first; it falls to 0.
    sink_blocks, recent_blocks: always attended. budgets: shares of the context that are measured. validation: share of the
    documents held out.
    """

    steps: int = 4000
    rank: int = 32
    queries: int = 64
    lr: float = 2e-3
    sink_blocks: int = 4
    recent_blocks: int = 4
    budgets: tuple[float, ...] = (1 / 4, 1 / 8, 1 / 13, 1 / 16, 1 / 32)
    validation: float = 0.2
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in (("steps", 1), ("rank", 1), ("queries", 1), ("sink_blocks", 0), ("recent_blocks", 0)):
            checks.whole(name, getattr(self, name), least)
        checks.seed(self.seed)
        if not 0 < self.lr < 1:
            raise ConfigError(f"got lr={self.lr!r}, expected a learning rate between 0 and 1")
        if not all(0 < budget <= 1 for budget in self.budgets):
            raise ConfigError(f"got budgets={self.budgets}, expected shares above 0 and up to 1")


@dataclass(frozen=True, slots=True)
class SeerResult:
    """What came out: held-out recovered share of the best blocks by budget, held-out loss, parameters, seconds."""

    recovered: dict[str, float]
    loss: float
    parameters: int
    seconds: float


def train_seer(
    traces: str | Path, out: str | Path, config: SeerConfig | None = None, progress: bool = True
) -> SeerResult:
    """Train on the folder `traces` into `out`."""
    config, folder, began = config or SeerConfig(), Path(out), time.monotonic()
    reader = TraceReader(traces)
    meta = reader.meta
    edges = Edges(meta.block_size, config.sink_blocks, config.recent_blocks, meta.scale)
    training, held_out = split(_usable(reader, edges), config.validation, config.seed)
    make_folder(folder)
    gates: list[GateMap] = []
    log: list[list[float]] = []
    shares: list[Tensor] = []
    losses: list[float] = []
    bar = tqdm(total=meta.layers * config.steps, desc="gates", unit="step", disable=not progress)
    for layer in range(meta.layers):
        samples = [_sample(reader, name, layer) for name in training]
        found, log_of_layer = train_gate(
            samples,
            edges,
            f"{config.seed}/{layer}",
            rank=config.rank,
            steps=config.steps,
            queries=config.queries,
            lr=config.lr,
            done=bar.update,
        )
        log.append([round(loss, 4) for loss in log_of_layer])
        del samples
        kept = GateMap(found.queries.half().float(), found.keys.half().float())  # as it is saved
        gates.append(kept)
        checks = [_sample(reader, name, layer, with_mass=True) for name in held_out]
        shares += [measured(kept, sample, edges, config.budgets) for sample in checks]
        losses += [
            float(gate_loss(kept, sample, torch.arange(len(sample.positions), device="cpu"), edges))
            for sample in checks
        ]
    bar.close()
    predictor = _predictor(meta, config, len(training), gates)
    got, best = torch.stack(shares).sum(0)
    result = SeerResult(
        {f"{budget:.4f}": round(float(share), 4) for budget, share in zip(config.budgets, got / best, strict=True)},
        round(math.fsum(losses) / len(losses), 4),
        sum(parameter.numel() for parameter in predictor.gate.parameters()),
        time.monotonic() - began,
    )
    predictor.save_pretrained(folder)
    lines = [{"config": dataclasses.asdict(config)} | dataclasses.asdict(result)]
    lines += [{"layer": layer, "every": LOG_EVERY, "loss": found} for layer, found in enumerate(log)]
    write_text(folder / LOG, "".join(json.dumps(line) + "\n" for line in lines))
    write_text(folder / CARD, model_card(predictor.config, _details(config, result, len(training), len(held_out))))
    return result


def _sample(reader: TraceReader, name: str, layer: int, with_mass: bool = False) -> GateSample:
    vectors, size, heads = reader.vectors(name, layer), reader.meta.block_size, reader.meta.heads
    blocks = vectors.keys.shape[2] // size
    queries = vectors.queries[0].float().unflatten(0, (heads, -1)).transpose(1, 2).flatten(2)
    mass = block_truth(vectors, reader.meta.scale, size).mass[..., :blocks] if with_mass else None
    return GateSample(
        queries,
        pooled(vectors.keys[0, :, : blocks * size].unflatten(1, (-1, size))),
        reader.load(name, layer).rows[..., :blocks],
        vectors.first + torch.arange(queries.shape[1], device="cpu"),
        mass,
    )


def _usable(reader: TraceReader, edges: Edges) -> list[str]:
    least = (edges.sinks + edges.recent + 4) * edges.block_size
    names = [name for name in reader.documents if reader.size(name).first > least]
    if not names:
        raise TraceError(
            f"got no document with queries after {least} tokens, expected longer ones: capture longer texts"
        )
    return names


def _predictor(meta: TraceMeta, config: SeerConfig, documents: int, gates: Sequence[GateMap]) -> Predictor:
    settings = PredictorConfig(
        kind="seer-gate",
        block_size=meta.block_size,
        base_model=meta.base_model,
        fingerprint=meta.fingerprint,
        trained_on=f"captured attention of {documents} documents",
        layers=meta.layer_ids,
        heads=meta.heads,
        group=meta.query_heads // meta.heads,
        head_dim=meta.head_dim,
        rank=config.rank,
    )
    predictor = Predictor(settings)
    with torch.no_grad():
        for layer, found in enumerate(gates):
            predictor.gate.queries[layer], predictor.gate.keys[layer] = found.queries, found.keys
    return predictor


def _details(config: SeerConfig, result: SeerResult, training: int, held_out: int) -> str:
    settings = {name: value for name, value in dataclasses.asdict(config).items() if name != "budgets"}
    lines = [
        "## Training",
        "",
        f"{result.seconds:.0f} s on {training} documents, {held_out} more held out; {result.parameters:,} numbers in half precision.",
        f"Settings: {', '.join(f'{name}={value}' for name, value in settings.items())}.",
        "",
        "## Measured on the held-out documents",
        "",
        f"Divergence of the gate from the true block maxima: {result.loss:.4f} nats.",
        "",
        "Captured queries: attention between sinks and recent window inside the chosen blocks, as a share of what the best",
        "blocks hold, by budget (share of the context).",
        "",
        "| budget | recovered |",
        "|---|---|",
    ]
    return "\n".join([*lines, *(f"| {budget} | {share:.4f} |" for budget, share in result.recovered.items())])
