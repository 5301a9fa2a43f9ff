"""`attnpred chat`: read a document once, keep it, and ask about it: in a terminal, or question by question from a pipe."""

from pathlib import Path
from typing import Annotated

import typer

from attnpred import checks
from attnpred.cli.options import DtypeOption, WeightsOption, cache_options
from attnpred.config import CacheConfig


@cache_options()
def chat(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="Hub id, local folder, GGUF file, or a name of `attnpred models`.")
    ],
    config: CacheConfig,
    document: Annotated[
        Path | None, typer.Option(help="Text to ask about; left out: a conversation without one.")
    ] = None,
    policy: Annotated[str, typer.Option(help="Which policy chooses (see `attnpred info`).")] = "predicted",
    predictor: Annotated[str | None, typer.Option(help="Folder or Hub id of a predictor of your own.")] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Most tokens of an answer.")] = 256,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Seed of the sampling.")] = 0,
    dtype: DtypeOption = "auto",
    weights: WeightsOption = None,
    max_document_tokens: Annotated[
        int | None, typer.Option(help="Read only so many tokens of the document; left out: all of it, or refuse it.")
    ] = None,
    keep_limit: Annotated[
        int | None,
        typer.Option(help="Most bytes of documents that are kept, all together; 0 keeps none; left out: 8 GiB."),
    ] = None,
) -> None:
    """Ask questions about a document, which is read once and kept; /help lists what else can be said."""
    import sys

    from attnpred.cli.about_text import about_text
    from attnpred.cli.lines import piped, typed
    from attnpred.cli.talk import Talk
    from attnpred.serving.answering import Sampling

    sampling = Sampling(
        checks.whole("max_new_tokens", max_new_tokens, 1, checks.TOKENS),
        checks.temperature(temperature),
        checks.seed(seed),
    )
    is_typed = sys.stdin.isatty()
    with about_text(
        model,
        document,
        policy=policy,
        predictor=predictor,
        config=config,
        weights=weights,
        dtype=dtype,
        most=max_document_tokens,
        kept=keep_limit,
    ) as conversation:
        conversation.open()
        talk = Talk(conversation, sampling, policy, predictor, is_typed=is_typed)
        talk.run(typed() if is_typed else piped())
