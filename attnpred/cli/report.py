"""`attnpred report`: rows of `attnpred eval` as one HTML page, and as figures for papers."""

from pathlib import Path
from typing import Annotated

import typer


def report(
    rows: Annotated[list[Path], typer.Argument(metavar="ROWS...", help="Files of rows that `attnpred eval` wrote.")],
    out: Annotated[Path, typer.Option("--out", help="HTML file for the report.")],
    figures: Annotated[Path | None, typer.Option(help="Folder for the charts as SVG files; made if missing.")] = None,
    bench: Annotated[Path | None, typer.Option(help="JSON of `attnpred bench decode --json`: latency.")] = None,
    attention: Annotated[Path | None, typer.Option(help="File of `attnpred demo --attention`: one head.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object as the last line.")] = False,
) -> None:
    """Write a report on measured rows: one HTML file that needs no network, and its charts as SVG files."""
    import json
    import sys

    from attnpred import __version__
    from attnpred.errors import ConfigError
    from attnpred.files import make_folder, try_out, write_text
    from attnpred.reading import same_file
    from attnpred.report.attention import load_attention
    from attnpred.report.latency import read_bench
    from attnpred.report.page import build
    from attnpred.report.rows import read_rows
    from attnpred.report.svg import standalone

    if out.is_dir() or not out.parent.is_dir():
        raise ConfigError(f"got {out}, expected the name of a file in a folder that exists")
    if figures is not None and figures.exists() and not figures.is_dir():
        raise ConfigError(f"got {figures}, expected a folder")
    sources = [*rows, *filter(None, (bench, attention))]
    if any(same_file(out, path) for path in sources):
        raise ConfigError(f"got --out {out}, which is also read, expected another file")
    try_out(out)
    if figures is not None:
        try_out(figures / "x.svg", makes_folder=True)
    found = read_rows(rows, lambda line: print(line, file=sys.stderr))
    made = build(
        found,
        None if bench is None else read_bench(bench),
        None if attention is None else load_attention(attention),
        __version__,
    )
    write_text(out, made.html)
    if figures is not None:
        make_folder(figures)
        for picture in made.pictures:
            write_text(figures / f"{picture.name}.svg", standalone(picture))
    if as_json:
        said = {"out": str(out), "rows": len(found), "charts": len(made.pictures)}
        print(json.dumps(said | {"figures": None if figures is None else str(figures)}))
    else:
        print(f"{out}: {len(found)} rows, {len(made.pictures)} charts")
