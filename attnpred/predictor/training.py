"""Trains a predictor on traces: mean squared error on the next row, as published (arXiv 2502.04077), with Adam.

The network starts as a plain average of recent rows (`start_as_average`): from random weights it ended far below that.

The loss is dominated by the few blocks with much attention; what counts is the order. So the result is measured on
held-out documents as the recovered share of the next row's mass, beside the two forecasts that need no training (an
exponential moving average and the last row), and the weights that recover most are kept.

Every step draws from a generator of its own seed and number, so a run that was interrupted and resumed ends with the
same bits as one that was not. `out` holds `model.safetensors`, `config.json` (the best so far, a usable predictor),
`README.md`, `train_log.jsonl` and `checkpoint.safetensors` (the state to resume from).
"""

import dataclasses
import hashlib
import json
import random
import statistics
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
from attnpred.predictor.card import model_card, training_details
from attnpred.predictor.cnn import PaperCNN, start_as_average
from attnpred.predictor.predictor_config import CARD, PredictorConfig
from attnpred.predictor.pretrained import Predictor
from attnpred.predictor.traces import TraceMeta, TraceReader, split
from attnpred.predictor.training_run import TrainingRun
from attnpred.predictor.windows import Windows, ema, recovered_share


@dataclass(frozen=True, slots=True)
class TrainConfig:
    """Settings of a training run.

    steps: of the optimiser, in all. queries: drawn per step. batch: windows per query. lr: of Adam, at first. history: H.
    sink_blocks, recent_blocks: cut off, as in inference. validation: share of the documents held out.
    eval_every: steps between measurements. eval_batches: queries measured, `batch` windows each.
    budget_fraction: share of the blocks that a selection holds when measured, sinks and recent window included.
    """

    steps: int = 1500
    queries: int = 4
    batch: int = 4
    lr: float = 3e-4
    history: int = 64
    sink_blocks: int = 4
    recent_blocks: int = 4
    seed: int = 0
    validation: float = 0.2
    eval_every: int = 100
    eval_batches: int = 64
    budget_fraction: float = 1 / 13

    def __post_init__(self) -> None:
        for name in ("steps", "queries", "batch", "history", "eval_every", "eval_batches"):
            checks.whole(name, getattr(self, name), 1)
        for name in ("sink_blocks", "recent_blocks"):
            checks.whole(name, getattr(self, name))
        checks.seed(self.seed)
        for name, largest in (("lr", float("inf")), ("validation", 1), ("budget_fraction", 1)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < largest:
                raise ConfigError(f"got {name}={value!r}, expected a number above 0 and below {largest}")


@dataclass(frozen=True, slots=True)
class TrainResult:
    """What came out.

    steps, seconds: in all, earlier runs included. train_loss: mean of the steps since the last measurement but one.
    best_step: the step of the saved weights; recovery: what was measured there, of `cnn`, `ema` and `last_step`.
    """

    steps: int
    best_step: int
    train_loss: float
    recovery: dict[str, float]
    parameters: int
    seconds: float


def train_predictor(
    traces: str | Path, out: str | Path, config: TrainConfig | None = None, device: str = "cpu", progress: bool = True
) -> TrainResult:
    """Train on the folder `traces` into `out`, going on where a run with the same settings was interrupted there."""
    config, folder = config or TrainConfig(), Path(out)
    reader = TraceReader(traces)
    windows = Windows(reader, config.history, config.sink_blocks, config.recent_blocks)
    training, held_out = split(windows.documents, config.validation, config.seed)
    predictor = _fresh_predictor(reader.meta, config, len(training)).to(device)
    make_folder(folder)
    run = TrainingRun(folder, predictor, config.lr, _settings(config, reader.meta, training, held_out))
    run.resume()
    began = time.monotonic() - (run.log[-1]["seconds"] if run.log else 0.0)
    losses: list[float] = []
    bar = tqdm(range(run.step + 1, config.steps + 1), "train", config.steps, initial=run.step, disable=not progress)
    for step in bar:
        rng = random.Random(f"{config.seed}/{step}")
        losses.append(run.learn(step, [windows.draw(rng, training, config.batch) for _ in range(config.queries)]))
        if step % config.eval_every == 0 or step == config.steps:
            recovery = _recovery(predictor, windows, held_out, config)
            run.record(step, statistics.fmean(losses), recovery, time.monotonic() - began)
            losses.clear()
            bar.set_postfix(recovery=f"{recovery['cnn']:.4f}", ema=f"{recovery['ema']:.4f}")
    details = training_details(run.log, run.best_step, dataclasses.asdict(config), len(training), len(held_out))
    write_text(folder / CARD, model_card(predictor.config, details))
    return TrainResult(
        steps=run.step,
        best_step=run.best_step,
        train_loss=run.log[-1]["train_loss"],
        recovery=next(line["recovery"] for line in run.log if line["step"] == run.best_step),
        parameters=sum(parameter.numel() for parameter in predictor.parameters()),
        seconds=run.log[-1]["seconds"],
    )


def _fresh_predictor(meta: TraceMeta, config: TrainConfig, documents: int) -> Predictor:
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(config.seed)
        predictor = Predictor(
            PredictorConfig(
                block_size=meta.block_size,
                history=config.history,
                base_model=meta.base_model,
                fingerprint=meta.fingerprint,
                trained_on=f"captured attention of {documents} documents",
            )
        )
    assert isinstance(predictor.network, PaperCNN)
    start_as_average(predictor.network, config.history)
    return predictor


def _settings(
    config: TrainConfig, meta: TraceMeta, training: Sequence[str], held_out: Sequence[str]
) -> dict[str, str | int | float]:
    settings = dataclasses.asdict(config)
    del settings["steps"]
    documents = hashlib.sha256(json.dumps([training, held_out]).encode()).hexdigest()[:16]
    return {**settings, "fingerprint": meta.fingerprint, "block_size": meta.block_size, "documents": documents}


@torch.no_grad()
def _recovery(predictor: Predictor, windows: Windows, names: Sequence[str], config: TrainConfig) -> dict[str, float]:
    """Return the mean recovered share of the network, an EMA and the last row, on the same windows every time."""
    rng = random.Random(f"{config.seed}/validation")
    device = next(predictor.parameters()).device
    shares: dict[str, list[Tensor]] = {"cnn": [], "ema": [], "last_step": []}
    for number in range(config.eval_batches):
        window = windows.draw(rng, [names[number * len(names) // config.eval_batches]], config.batch)
        rows, target = window.rows.to(device), window.target.to(device)
        count = max(1, int(config.budget_fraction * window.blocks) - config.sink_blocks - config.recent_blocks)
        for name, scores in (("cnn", predictor.network(rows)), ("ema", ema(rows)), ("last_step", rows[:, -1])):
            shares[name].append(recovered_share(scores, target, count))
    means = {name: float(torch.cat(parts).nanmean()) for name, parts in shares.items()}
    if any(mean != mean for mean in means.values()):
        raise TraceError("got held-out documents without any attention between sinks and recent window: capture again")
    return means
