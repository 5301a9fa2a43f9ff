"""`attnpred capture`: write the attention of a model over your texts, to train a predictor on (`attnpred train`)."""

from pathlib import Path
from typing import Annotated

import typer

from attnpred import checks
from attnpred.cli.options import DtypeOption
from attnpred.cli.words import text_files


def capture(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="Hub id, local folder, GGUF file, or a name of `attnpred models`.")
    ],
    text: Annotated[
        list[Path], typer.Option("--text", help="Text file, or folder of .txt files; may be given more than once.")
    ],
    out: Annotated[Path, typer.Option("--out", help="Folder for the traces; an interrupted run there is resumed.")],
    tokens: Annotated[int, typer.Option(help="Tokens of a document.")] = 4096,
    rows: Annotated[int, typer.Option(help="Last queries of a document that are recorded.")] = 512,
    per_file: Annotated[int | None, typer.Option(help="At most this many documents of a file.")] = None,
    block_size: Annotated[int, typer.Option(help="Tokens of a block.")] = 16,
    dtype: DtypeOption = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object as the last line.")] = False,
) -> None:
    """Record the true attention of a model; progress goes to stderr."""
    import json

    from attnpred.capture import capture as run
    from attnpred.errors import ConfigError
    from attnpred.files import try_out
    from attnpred.hf import load_model

    files = text_files(text)
    for option, value in (("tokens", tokens), ("rows", rows), ("block_size", block_size)):
        checks.whole(option, value, 1, checks.TOKENS)
    if per_file is not None:
        checks.whole("per_file", per_file, 1)
    if out.exists() and not out.is_dir():
        raise ConfigError(f"got {out}, expected a folder, or a new name for one")
    try_out(out / "traces.json", makes_folder=True)
    lm, tokenizer = load_model(model, dtype=dtype)
    name = "attnpred demo LM" if model == "demo" else model
    count = run(
        lm, tokenizer, files, out, base_model=name, tokens=tokens, rows=rows, block_size=block_size, per_file=per_file
    )
    print(json.dumps({"documents": count, "out": str(out)}) if as_json else f"{out}: {count} documents")
