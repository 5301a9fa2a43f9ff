"""`attnpred eval`: policies compared on a model, one JSON line per row."""

from pathlib import Path
from typing import Annotated

import typer

POLICIES = "streaming,last_step,ema,h2o,mean_key_last,mean_key,quest,predicted:late_share=0,predicted,oracle"


def evaluate(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A Hub id, a local folder, or 'demo'.")],
    out: Annotated[Path, typer.Option("--out", help="File for the rows, one JSON object per line.")],
    tasks: Annotated[str, typer.Option(help="What to measure: recovery.")] = "recovery",
    policies: Annotated[
        str, typer.Option(help="Policies, comma or space between them; settings as in 'ema:rate=0.1'.")
    ] = POLICIES,
    budgets: Annotated[str, typer.Option(help="Shares of the context.")] = "0.25,0.125,0.0769,0.0625,0.03125",
    lengths: Annotated[str, typer.Option(help="Tokens of a document.")] = "4096",
    texts: Annotated[str, typer.Option(help="facts, book, code, table, or text files.")] = "facts,book,code,table",
    documents: Annotated[int, typer.Option(min=1, help="Documents of each kind of text.")] = 4,
    steps: Annotated[int, typer.Option(min=1, help="Decode steps of each document, at its end.")] = 128,
    sink_tokens: Annotated[int, typer.Option(help="First tokens, always attended.")] = 16,
    recent_tokens: Annotated[int, typer.Option(help="Last tokens, always attended.")] = 32,
    calibration: Annotated[
        int | None, typer.Option(help="A true row every so many steps; 0: never; left out: what the policy asks for.")
    ] = None,
    block_size: Annotated[int, typer.Option(help="Tokens selected together.")] = 16,
    seed: Annotated[int, typer.Option(help="Seed of the texts.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object as the last line.")] = False,
) -> None:
    """Measure what policies recover of the true attention, each with its own history; progress goes to stderr."""
    import json

    from tqdm import tqdm

    from attnpred.cli.words import floats, words
    from attnpred.config import CacheConfig
    from attnpred.errors import ConfigError
    from attnpred.evaluation import recovery_task
    from attnpred.evaluation.variants import parse_variant
    from attnpred.hf import load_model
    from attnpred.predictor.files import write_text

    if tasks != "recovery":
        raise ConfigError(f"got --tasks {tasks}, expected recovery")
    if not words(policies) or not words(texts):
        raise ConfigError(f"got --policies {policies!r} and --texts {texts!r}, expected at least one of each")
    if not out.parent.is_dir():
        raise ConfigError(f"got {out}, expected a file in a folder that exists")
    variants = [parse_variant(word) for word in words(policies)]
    shares = floats("--budgets", budgets)
    sizes = [int(size) for size in floats("--lengths", lengths)]
    settings = CacheConfig(
        budget=1.0,
        block_size=block_size,
        num_sink_tokens=sink_tokens,
        recent_window=recent_tokens,
        calibration_interval=calibration,
        dense_layers=0,
        dense_when_fits=False,
    )
    loaded, tokenizer = load_model(model)
    lines: list[str] = []
    for length in sizes:
        if length <= settings.history + steps:
            raise ConfigError(
                f"got --lengths {length}, expected more than {settings.history + steps} (history and steps)"
            )
        found = recovery_task.documents(
            loaded, tokenizer, words(texts), length, documents, settings.history + steps, seed, block_size
        )
        facts = {
            "model": model,
            "seed": seed,
            "steps": steps,
            "calibration": calibration,
            "block_size": block_size,
            "sink_tokens": sink_tokens,
            "recent_tokens": recent_tokens,
        }
        kinds = len({document.kind for document in found}) + 1
        made = recovery_task.rows(found, variants, shares, loaded.config, settings, facts)
        for row in tqdm(made, f"{length} tokens", len(variants) * len(shares) * kinds):
            lines.append(json.dumps(row))
        write_text(out, "".join(line + "\n" for line in lines))
    print(json.dumps({"rows": len(lines), "out": str(out)}) if as_json else f"{out}: {len(lines)} rows")
