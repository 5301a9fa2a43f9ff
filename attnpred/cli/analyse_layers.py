"""`attnpred analyse-layers`: which layers can share the keys of distant tokens (PoD, the setting `layer_groups`)."""

from pathlib import Path
from typing import Annotated

import typer

from attnpred import checks
from attnpred.cli.options import DtypeOption
from attnpred.cli.words import text_files


def analyse_layers(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="Hub id, local folder, GGUF file, or a name of `attnpred models`.")
    ],
    text: Annotated[
        list[Path], typer.Option("--text", help="Text file, or folder of .txt files; may be given more than once.")
    ],
    out: Annotated[Path, typer.Option("--out", help="JSON file for the groups.")],
    delta: Annotated[float, typer.Option(help="Least similarity, 0 to 1, of the layers of a group.")] = 0.5,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens of a sample.")] = 2048,
    rows: Annotated[int, typer.Option(min=1, help="Last tokens of a sample whose attention is compared.")] = 64,
    per_file: Annotated[int, typer.Option(min=1, help="At most this many samples of a file.")] = 4,
    figure: Annotated[Path | None, typer.Option(help="Also draw the similarities: a .png or .svg file.")] = None,
    dtype: DtypeOption = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object as the last line.")] = False,
) -> None:
    """Group layers of similar attention, which can share keys (policy pod)."""
    import json

    from attnpred.errors import ConfigError
    from attnpred.evaluation.layer_analysis import analyse_layers as run
    from attnpred.files import try_out
    from attnpred.hf import load_model
    from attnpred.report.figure_file import try_out_figure
    from attnpred.report.layers_figure import FORMATS, draw

    files = text_files(text)
    for option, value in (("tokens", tokens), ("rows", rows), ("per_file", per_file)):
        checks.whole(option, value, 1, checks.TOKENS)
    if not 0 <= delta <= 1:
        raise ConfigError(f"got delta={delta!r}, expected a similarity from 0 to 1")
    try_out(out)
    if figure is not None:
        try_out_figure(figure, FORMATS)
    lm, tokenizer = load_model(model, dtype=dtype)
    name = "attnpred demo LM" if model == "demo" else model
    found = run(lm, tokenizer, files, base_model=name, delta=delta, tokens=tokens, rows=rows, per_file=per_file)
    found.save(out)
    if figure is not None:
        draw(found, figure)
    if as_json:
        said = {"out": str(out), "groups": found.groups, "dropped": found.dropped, "rows": found.rows}
        print(json.dumps(said | {"figure": None if figure is None else str(figure)}))
        return
    print(f"{out}: {found.dropped:.0%} of the distant keys need not be kept at delta {delta:g}")
    for head, groups in enumerate(found.groups):
        print(f"kv head {head}: {' | '.join(' '.join(map(str, group)) for group in groups)}")
