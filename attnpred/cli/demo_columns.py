"""`attnpred demo` with a real model: a text is read once, and asked about in one column after the other.

The answers are shown as they come; then the figures of all columns, and the picture of what was read for one answer.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from attnpred.cli.tables import drawn
from attnpred.config import CacheConfig

if TYPE_CHECKING:
    from attnpred.evaluation.columns import Column, Given
    from attnpred.evaluation.comparison import Plan
    from attnpred.evaluation.quiz import Quiz, QuizFact
    from attnpred.evaluation.shown import Shown
    from attnpred.evaluation.variants import Variant

SPARE = 256
"""Tokens of the model's context that a text leaves for a question and its answer."""


@dataclass(frozen=True, slots=True)
class Wanted:
    """What was asked for on the command line, and checked; see the options of `attnpred demo`. book: what is in `text`."""

    model: str
    dtype: str
    config: CacheConfig
    variants: "list[Variant]"
    compression: float
    text: Path | None
    book: str | None
    plan: "Plan"
    figure: Path | None
    attention: Path | None
    as_json: bool


def read_and_ask(wanted: Wanted, model: Any, tokenizer: Any) -> None:
    """Read the text, ask every column, print."""
    import json
    from dataclasses import replace

    from tqdm import tqdm

    from attnpred.errors import ConfigError
    from attnpred.evaluation.columns import Asking, read_text
    from attnpred.evaluation.comparison import IN_MEMORY, compressed
    from attnpred.evaluation.quiz import TEXT, TITLE, make_quiz
    from attnpred.evaluation.shown import look_at
    from attnpred.evaluation.variants import parse_variant
    from attnpred.reading import read_text as read_file

    book = read_file(TEXT) if wanted.book is None else wanted.book
    quiz = make_quiz(tokenizer, book, wanted.plan.seed)
    limit = model.config.get_text_config().max_position_embeddings - SPARE
    if len(quiz.ids) > limit:
        raise ConfigError(
            f"got {len(quiz.ids)} tokens of text, expected at most {limit} for {wanted.model}: give a shorter one"
        )
    source = str(wanted.text) if wanted.text else f"a part of {TITLE}"
    chosen = [("full", *parse_variant("full").make(model.config, replace(wanted.config, **IN_MEMORY)))]
    for variant in wanted.variants:
        chosen.append((variant.label, *compressed(model, variant, wanted.config, len(quiz.ids), wanted.compression)))
    print(f"{wanted.model} reads {source}: {len(quiz.ids):,} tokens, in which {len(quiz.facts)} facts are hidden.")
    with tqdm(total=len(quiz.ids), unit=" tokens", desc="reading", file=sys.stderr) as bar:
        read = read_text(model, quiz, wanted.config, lambda done, _: bar.update(done - bar.n))
    print(f"Read once, with full attention, in {read.seconds:.0f} s. Every column goes on from there.\n")
    asking = Asking(model, tokenizer, read)
    stream = _Stream()
    columns = []
    for label, policy, settings in chosen:
        print(
            "With the full cache:" if label == "full" else f"With {label}, which reads 1/{wanted.compression:g} of it:"
        )
        columns.append(asking.column(label, policy, settings, stream))
        print(f"  {columns[-1].correct} of {len(quiz.facts)} right.\n")
    print(table(columns))
    result = {
        "model": wanted.model, "text": source, "context_tokens": len(quiz.ids), "seed": wanted.plan.seed, "compression": wanted.compression,
        "offload": wanted.config.offload, "read_seconds": read.seconds, "figure": None, "attention": None,
        "columns": [column.as_dict() for column in columns],
    }  # fmt: skip
    if wanted.figure is not None or wanted.attention is not None:
        given = _worth_showing(quiz, columns[1].answers)
        shown = look_at(model, tokenizer, read, given, *chosen[1][1:])
        result |= _show(wanted, tokenizer, source, quiz, given, shown)
    if wanted.as_json:
        print(json.dumps(result))


class _Stream:
    """Prints answers as they come, a line each."""

    def asked(self, fact: "QuizFact") -> None:
        print(f"  {fact.question:<48}", end="", flush=True)

    def heard(self, piece: str) -> None:
        print(piece.replace("\n", " "), end="", flush=True)

    def answered(self, given: "Given") -> None:
        print("" if given.is_right else f"  (not right: {given.fact.answer})")


def table(columns: "list[Column]") -> str:
    """Return the figures of all columns, one column each."""
    rows = [
        ("answers right", [f"{column.correct} of {len(column.answers)}" for column in columns]),
        ("KL to the full cache per token", ["-" if column.kl is None else f"{column.kl:.3f}" for column in columns]),
        ("tokens attended per head", [f"{column.costs['tokens_attended']:,.0f}" for column in columns]),
        ("KV read per step", [f"{column.costs['bytes_per_step'] / 2**20:.1f} MiB" for column in columns]),
        ("fast memory", [f"{column.costs['fast_bytes'] / 2**20:.1f} MiB" for column in columns]),
        ("ms per token", [f"{column.costs['ms_per_token']:.0f}" for column in columns]),
    ]
    return drawn(["", *(column.policy for column in columns)], [[name, *cells] for name, cells in rows], numbers=True)


def _worth_showing(quiz: "Quiz", answers: "list[Given]") -> "Given":
    """Return the first right answer whose fact stands in the middle half of the text, else a right one, else the first."""
    right = [given for given in answers if given.is_right]
    middle = [given for given in right if 1 / 4 < quiz.place(given.fact) / len(quiz.text) < 3 / 4]
    return [*middle, *right, *answers][0]


def _show(
    wanted: Wanted, tokenizer: Any, source: str, quiz: "Quiz", given: "Given", shown: "Shown"
) -> dict[str, str | None]:
    """Write the picture and the maps that are wanted, and say so; return where they are."""
    from attnpred.hf.named_models import NAMED_MODELS
    from attnpred.report.attention import HeadAttention, save_attention
    from attnpred.report.page_figure import PageView, draw_page

    head = f"layer {shown.layer}, head {shown.head}"
    written: dict[str, str | None] = {}
    if wanted.figure is not None:
        place = quiz.place(given.fact)
        view = PageView(
            model=NAMED_MODELS[wanted.model].title.partition(",")[0] if wanted.model in NAMED_MODELS else wanted.model,
            source=source,
            question=given.fact.question,
            answer=given.text,
            heads=shown.heads,
            head_name=head,
            words=[_word(tokenizer, token) for token in given.ids],
            text=quiz.text,
            spans=shown.spans,
            fact=(place, place + len(given.fact.statement)),
            share=shown.share,
            true=shown.true,
            forecast=shown.forecast,
            selected=shown.selected,
        )
        draw_page(view, wanted.figure)
        written["figure"] = str(wanted.figure)
        print(f"\nPicture: {wanted.figure}")
    if wanted.attention is not None and shown.forecast is None:
        print(f"the first policy forecasts nothing: {wanted.attention} was not written", file=sys.stderr)
    elif wanted.attention is not None and shown.forecast is not None:
        title = f"{head}, {len(quiz.ids)} tokens of context"
        save_attention(HeadAttention(title, shown.true, shown.forecast, shown.selected), wanted.attention)
        written["attention"] = str(wanted.attention)
        print(f"Attention: {wanted.attention} (see `attnpred report --attention`)")
    return written


def _word(tokenizer: Any, token: int) -> str:
    """Return what a map calls a token of the answer."""
    if token in tokenizer.all_special_ids:
        return "(end)"
    return str(tokenizer.decode([token])).strip() or "\u00b7"
