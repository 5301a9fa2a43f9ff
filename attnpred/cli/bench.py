"""`attnpred bench`: run one of the repository's benchmarks; it prints its figures, and one JSON object as the last line."""

from typing import Annotated

import typer

BENCHMARKS = ("attention", "selection", "decode", "batches", "offload", "memory", "rivals", "serve")


def bench(
    context: typer.Context,
    name: Annotated[str, typer.Argument(metavar="NAME", help=f"One of {', '.join(BENCHMARKS)}.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print nothing but the JSON object, where possible.")] = False,
) -> None:
    """Measure speed on this machine; further options go to the benchmark (`attnpred bench offload -- --help`)."""
    from importlib import import_module
    from importlib.util import find_spec

    from attnpred.errors import ConfigError

    if name not in BENCHMARKS:
        raise ConfigError(f"got benchmark {name!r}, expected one of {', '.join(BENCHMARKS)}")
    if find_spec("benchmarks") is None or find_spec(f"benchmarks.{name}") is None:
        raise ConfigError("got an installation without benchmarks, expected a checkout of the repository: clone it")
    import_module(f"benchmarks.{name}").main([*context.args, *(["--json"] if as_json else [])])
