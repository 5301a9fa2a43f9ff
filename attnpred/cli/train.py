"""`attnpred train`: a predictor of your own from a folder of traces (see `attnpred capture`)."""

from pathlib import Path
from typing import Annotated

import typer


def train(
    traces: Annotated[Path, typer.Argument(metavar="DIR", help="Folder of traces, written by `attnpred capture`.")],
    out: Annotated[Path, typer.Option("--out", help="Folder for the predictor; an interrupted run there is resumed.")],
    steps: Annotated[int, typer.Option(help="Steps of the optimiser.")] = 1500,
    batch: Annotated[int, typer.Option(help="Windows per query; a step takes four queries.")] = 16,
    lr: Annotated[float, typer.Option(help="Learning rate of Adam, at first; it falls.")] = 3e-4,
    seed: Annotated[int, typer.Option(help="Seed of the weights, the split and the order.")] = 0,
    history: Annotated[int, typer.Option(help="Rows of past attention that the predictor sees.")] = 64,
    sink_tokens: Annotated[int, typer.Option(help="First tokens, always attended and not scored.")] = 64,
    recent_tokens: Annotated[int, typer.Option(help="Last tokens, always attended and not scored.")] = 64,
    device: Annotated[str, typer.Option(help="Where to train: cpu, cuda, ...")] = "cpu",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object as the last line.")] = False,
) -> None:
    """Train a predictor on captured attention; progress goes to stderr."""
    import dataclasses
    import json

    from attnpred.errors import ConfigError
    from attnpred.predictor.traces import TraceReader
    from attnpred.predictor.training import TrainConfig, train_predictor

    block_size = TraceReader(traces).meta.block_size
    for name, tokens in (("--sink-tokens", sink_tokens), ("--recent-tokens", recent_tokens)):
        if tokens % block_size:
            raise ConfigError(f"got {name} {tokens}, expected a multiple of the traces' block size {block_size}")
    config = TrainConfig(
        steps=steps,
        batch=batch,
        lr=lr,
        history=history,
        sink_blocks=sink_tokens // block_size,
        recent_blocks=recent_tokens // block_size,
        seed=seed,
    )
    result = train_predictor(traces, out, config, device=device)
    if as_json:
        print(json.dumps({**dataclasses.asdict(result), "out": str(out)}))
        return
    shares = result.recovery
    print(
        f"{out}: {result.parameters:,} parameters, {result.steps} steps, {result.seconds:.0f} s, training loss {result.train_loss:.3e}"
    )
    print(
        f"recovered on held-out documents: {shares['cnn']:.4f} (step {result.best_step}); "
        f"EMA of the rows {shares['ema']:.4f}, last row {shares['last_step']:.4f}"
    )
