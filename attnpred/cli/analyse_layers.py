"""`attnpred analyse-layers`: which layers can share the keys of distant tokens (PoD, the setting `layer_groups`)."""

from pathlib import Path
from typing import Annotated

import typer


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
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object as the last line.")] = False,
) -> None:
    """Group layers of similar attention, which can share keys (policy pod)."""
    import json

    from attnpred.errors import ConfigError
    from attnpred.evaluation.layer_analysis import analyse_layers as run
    from attnpred.hf import load_model
    from attnpred.report.layers_figure import check_name, draw

    files = [file for path in text for file in (sorted(path.glob("*.txt")) if path.is_dir() else [path])]
    missing = [str(file) for file in files if not file.is_file()]
    if missing or not files:
        raise ConfigError(f"got {missing[0] if missing else text[0]}, expected a text file or a folder of .txt files")
    if out.is_dir():
        raise ConfigError(f"got {out}, a folder, expected the name of a file")
    if figure is not None:
        check_name(figure)
    lm, tokenizer = load_model(model)
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
