"""`attnpred demo`: a real model reads a book with hidden facts once, and answers with all of its cache and with parts of it.

Without the model (its package cannot be had) the language model of this package takes its place, in a comparison of its own
(`attnpred.cli.demo_embedded`), which `--model demo` asks for.
"""

from pathlib import Path
from typing import Annotated, Any

import typer

from attnpred.cli.options import DtypeOption, cache_options
from attnpred.config import CacheConfig

EMBEDDED_ONLY = ("context", "documents", "steps")
"""Options that only `--model demo` has a use for."""
EMBEDDED = {"context": 7680, "documents": 5, "steps": 256}
"""What they are then. The model was made for 8,192 tokens: the context leaves room for questions and continuation."""
FORMATS = (".png", ".svg", ".pdf")
"""What the picture may be; of a page that was read it is the first."""


@cache_options(
    defaults={"offload": "disk", "calibration_interval": 0},
    fixed={"budget": 1.0, "measure_recovery": False},
)
def demo(
    config: CacheConfig,
    model: Annotated[
        str, typer.Option(help="Which model reads: `demo`, the embedded one, or any MODEL with a chat template.")
    ] = "smollm2",
    policies: Annotated[
        str, typer.Option(help="Which policies choose, beside the full cache (see `attnpred info`).")
    ] = "predicted,ema",
    compression: Annotated[float, typer.Option(help="How many times less KV is to be read per step, all told.")] = 13.0,
    text: Annotated[Path | None, typer.Option(help="A text of your own instead of the embedded book.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the hidden facts.")] = 1,
    figure: Annotated[
        Path | None, typer.Option(help="Write a picture of what the first policy read for an answer (extra `plot`).")
    ] = None,
    attention: Annotated[
        Path | None, typer.Option(help="Write one head's attention as numbers, for `attnpred report --attention`.")
    ] = None,
    dtype: DtypeOption = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object as the last line.")] = False,
    context: Annotated[int | None, typer.Option(min=1, help="With --model demo: tokens of the book (7680).")] = None,
    documents: Annotated[int | None, typer.Option(min=1, help="With --model demo: texts with facts (5).")] = None,
    steps: Annotated[
        int | None, typer.Option(min=2, help="With --model demo: tokens of the continuation (256).")
    ] = None,
) -> None:
    """Let a model read a book once, and answer questions about it with the full KV cache and with parts of it."""
    import sys

    from attnpred import checks
    from attnpred.cli.about_text import compile_kernels
    from attnpred.cli.demo_columns import Wanted, read_and_ask
    from attnpred.cli.demo_embedded import embedded
    from attnpred.cli.words import words
    from attnpred.errors import ConfigError, FetchError, MissingExtraError
    from attnpred.evaluation.comparison import Plan
    from attnpred.evaluation.variants import parse_variant
    from attnpred.files import try_out
    from attnpred.hf import load_model
    from attnpred.reading import read_text
    from attnpred.report.figure_file import try_out_figure

    only = zip(EMBEDDED_ONLY, (context, documents, steps), strict=True)
    own: dict[str, Any] = {name: value for name, value in only if value is not None}
    if own and model != "demo":
        raise ConfigError(f"got --{next(iter(own))} with model {model!r}, expected it with --model demo: leave it out")
    variants = [parse_variant(word) for word in words(policies)]
    if not variants:
        raise ConfigError(f"got --policies {policies!r}, expected at least one (see `attnpred info policies`)")
    checks.compression(compression)
    plan = Plan(**(EMBEDDED | own), seed=seed)
    book = None if text is None else read_text(text)
    if book is not None and not book.strip():
        raise ConfigError(f"got an empty text in {text}, expected some sentences to hide facts in")
    if figure is not None:
        try_out_figure(figure, FORMATS if model == "demo" else FORMATS[:1])
    if attention is not None:
        try_out(attention)
    wanted = Wanted(model, dtype, config, variants, compression, text, book, plan, figure, attention, as_json)
    if model != "demo":
        try:
            loaded, tokenizer = load_model(model, dtype=dtype)
        except (FetchError, MissingExtraError) as error:
            print(f"{error}: going on with the small model of this package (--model demo)", file=sys.stderr)
        else:
            compile_kernels(loaded.device.type)
            return read_and_ask(wanted, loaded, tokenizer)
    return embedded(wanted)
