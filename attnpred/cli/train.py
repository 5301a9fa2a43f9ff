"""`attnpred train`: a predictor of your own from a folder of traces (see `attnpred capture`)."""

from pathlib import Path
from typing import Annotated

import typer


def train(
    traces: Annotated[Path, typer.Argument(metavar="DIR", help="Folder of traces, written by `attnpred capture`.")],
    out: Annotated[Path, typer.Option("--out", help="Folder for the predictor.")],
    predictor: Annotated[
        str,
        typer.Option(
            help="cnn: the forecast as published, for predicted; seer-gate: for seer. `predicted` itself needs none."
        ),
    ] = "cnn",
    steps: Annotated[int, typer.Option(help="Steps of the optimiser; 0: 1500 for cnn, 4000 for seer-gate.")] = 0,
    rank: Annotated[int, typer.Option(help="Directions that a gate keeps.")] = 32,
    batch: Annotated[int, typer.Option(help="Windows per query; a step takes four queries (cnn).")] = 4,
    lr: Annotated[float, typer.Option(help="Learning rate of Adam, at first; it falls (cnn).")] = 3e-4,
    seed: Annotated[int, typer.Option(help="Seed of the weights, the split and the order.")] = 0,
    history: Annotated[int, typer.Option(help="Rows of past attention that a prompt gives.")] = 64,
    sink_tokens: Annotated[int, typer.Option(help="First tokens, always attended and not scored.")] = 64,
    recent_tokens: Annotated[int, typer.Option(help="Last tokens, always attended and not scored.")] = 64,
    device: Annotated[str, typer.Option(help="Where to train the cnn: cpu, cuda, ...")] = "cpu",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object as the last line.")] = False,
) -> None:
    """Train a predictor on captured attention; progress goes to stderr. An interrupted run of the cnn is resumed."""
    import dataclasses
    import json

    from attnpred.errors import ConfigError
    from attnpred.files import try_out
    from attnpred.predictor.seer_training import SeerConfig, train_seer
    from attnpred.predictor.traces import TraceReader
    from attnpred.predictor.training import TrainConfig, train_predictor

    if predictor not in ("cnn", "seer-gate"):
        raise ConfigError(f"got --predictor {predictor!r}, expected cnn or seer-gate")
    block_size = TraceReader(traces).meta.block_size
    try_out(out / "config.json", makes_folder=True)
    for name, tokens in (("--sink-tokens", sink_tokens), ("--recent-tokens", recent_tokens)):
        if tokens % block_size:
            raise ConfigError(f"got {name} {tokens}, expected a multiple of the traces' block size {block_size}")
    sinks, recent = sink_tokens // block_size, recent_tokens // block_size
    # all settings are checked, also those that another predictor has no use for
    config = TrainConfig(
        steps=steps or 1500, batch=batch, lr=lr, history=history, seed=seed, sink_blocks=sinks, recent_blocks=recent
    )
    if predictor == "cnn":
        result = train_predictor(traces, out, config, device=device)
        if as_json:
            print(json.dumps({**dataclasses.asdict(result), "out": str(out)}))
            return
        shares = result.recovery
        print(
            f"{out}: {result.parameters:,} parameters, {result.steps} steps, {result.seconds:.0f} s, "
            f"training loss {result.train_loss:.3e}\n"
            f"recovered on held-out documents: {shares['cnn']:.4f} (step {result.best_step}); "
            f"EMA of the rows {shares['ema']:.4f}, last row {shares['last_step']:.4f}"
        )
        return
    gate = SeerConfig(steps=steps or 4000, rank=rank, seed=seed, sink_blocks=sinks, recent_blocks=recent)
    trained = train_seer(traces, out, gate)
    if as_json:
        print(json.dumps({**dataclasses.asdict(trained), "out": str(out)}))
        return
    print(f"{out}: {trained.parameters:,} parameters, {trained.seconds:.0f} s")
    print("recovered on held-out documents, by budget:")
    for budget, share in trained.recovered.items():
        print(f"  {budget}  {share:.4f}")
