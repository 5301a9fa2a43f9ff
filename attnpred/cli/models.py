"""`attnpred models`: the models that have a name, and which of them are here; `attnpred models fetch NAME` gets one.

A name is fetched at its first use too, wherever MODEL is taken, unless there are terms to agree to.
"""

import json
from enum import Enum
from typing import Annotated, Any

import typer

from attnpred.cli.tables import drawn

DEMO: dict[str, Any] = {
    "name": "demo",
    "title": "demo LM of this project",
    "parameters": "5M",
    "licence": "Apache-2.0",
    "context": 8192,
    "source": "comes with attnpred",
}
COLUMNS = ("name", "title", "parameters", "licence", "context", "download", "source", "here")


class Action(str, Enum):
    """What the command does beside listing."""

    fetch = "fetch"


def models(
    action: Annotated[Action | None, typer.Argument(help="`fetch`: get the named model; left out: list them.")] = None,
    name: Annotated[str | None, typer.Argument(help="Which one to fetch.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")] = False,
) -> None:
    """List the models that have a name: size, licence, context, source, and whether they are here; or fetch one."""
    rows = collect()
    if action is None:
        print(json.dumps({"models": rows}) if as_json else _text(rows))
        return
    folder = fetch(name)
    print(json.dumps({"name": name, "folder": folder}) if as_json else f"{name} is in {folder}")


def fetch(name: str | None) -> str:
    """Return the folder of the named model, fetched because it was asked for. Raises `ConfigError` for another name."""
    from attnpred.errors import ConfigError
    from attnpred.hf import named_models
    from attnpred.hf.fetch import fetch_model

    if name == DEMO["name"]:
        return str(named_models.DEMO_MODEL)
    if name is None or name not in named_models.NAMED_MODELS:
        raise ConfigError(
            f"got {'no name' if name is None else repr(name)} to fetch, expected one of {', '.join(named_models.NAMED_MODELS)}: "
            f"a Hub id or a file of your own needs no fetching, give it as MODEL"
        )
    return str(fetch_model(name, asked=True))


def collect() -> list[dict[str, Any]]:
    """Return the rows of the list, ready for JSON. download: bytes; here: the folder, or None."""
    from attnpred.hf import named_models
    from attnpred.hf.named_models import folder_of

    rows = [DEMO | {"download": 0, "here": str(named_models.DEMO_MODEL)}]
    for name, model in named_models.NAMED_MODELS.items():
        folder = folder_of(model.sha256)
        rows.append(
            {
                "name": name,
                "title": model.title,
                "parameters": model.parameters,
                "licence": model.licence,
                "context": model.context,
                "download": model.download,
                "source": f"package index: {model.source}",
                "here": str(folder) if folder.exists() else None,
            }
        )
    return rows


def _text(rows: list[dict[str, Any]]) -> str:
    lines = []
    for row in rows:
        size = f"{row['download'] / 1e6:.0f} MB" if row["download"] else "-"
        shown = row | {"context": f"{row['context']:,}", "download": size, "here": row["here"] or "no"}
        lines.append([str(shown[column]) for column in COLUMNS])
    return f"{drawn(COLUMNS, lines)}\nget one: attnpred models fetch NAME"
