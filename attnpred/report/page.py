"""The report: one HTML page that needs nothing else, no network and no script, and its charts as files for papers.

The page says so itself: its content security policy allows the style and the script that it holds, by their hashes, and
images inside it, and nothing else. So a word in a row that looks like markup could do nothing even unescaped.
"""

import base64
import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

from attnpred.report.attention import HeadAttention, attention_pictures
from attnpred.report.latency import MEANING, Bench, bench_charts, bench_tables, row_charts
from attnpred.report.look import looks
from attnpred.report.markup import bullets, figures, folded, paragraph, table
from attnpred.report.needles import needle_maps
from attnpred.report.places import places
from attnpred.report.results import against_budget, against_cost, label_tables, names, result_table
from attnpred.report.rows import Row
from attnpred.report.style import SCRIPT, STYLE
from attnpred.report.summary import headline, sentences
from attnpred.report.svg import Picture
from attnpred.report.words import difference, measured, verdict
from attnpred.row_check import CHECK

OPEN = 4
"""Places that are shown unfolded."""
FIGURES = {  # keys of a row that have a column in the table of rows
    "ms_per_token": "ms per token", "bytes_per_step": "bytes read per step",
    "moved_bytes_per_step": "bytes fetched per step", "fast_bytes": "fast bytes", "slow_bytes": "slow bytes",
    "compression": "compression", "tokens_attended": "tokens attended", "hit_rate": "hit rate", "recovery": "attention recovery",
    "recovery_ratio": "recovery ratio",
}  # fmt: skip
NOT_SETTINGS = (*FIGURES, "model", "policy", "budget", "task", "text", "length", "metric", "value", "interval", "n",
                "against_full", "items", CHECK)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Report:
    """The page, and every chart of it."""

    html: str
    pictures: tuple[Picture, ...]


def build(
    rows: Sequence[Row], bench: Bench | None = None, attention: HeadAttention | None = None, version: str = ""
) -> Report:
    """Return the report on `rows`, at least one; the same for the same arguments."""
    found = places(rows)
    look = looks(names(found))
    shown: list[Picture] = []

    def draw(pictures: Sequence[Picture]) -> str:
        shown.extend(pictures)
        return figures(pictures)

    told, parts = [], []
    for i, place in enumerate(found):
        heading = f"<h3>{escape(place.name)}: {escape(place.metric)}</h3>"
        charts = [*against_budget(place, look, f"budget{i}"), *against_cost(place, look, f"cost{i}")]
        body = result_table(place, f"results{i}") + draw(charts) + "".join(label_tables(place, f"results{i}"))
        parts.append(folded(heading, body, i < OPEN))
        told.append(folded(heading, bullets(sentences(place)), i < OPEN))
    sections = [
        ("summary", "Summary", bullets(headline(rows, found)) + "".join(told)),
        ("results", "Results by task", "".join(parts)),
    ]
    needles = needle_maps(found)
    if needles:
        sections.append(("needles", "Needles by depth and length", draw(needles)))
    sections.append(("latency", "Latency against context", _latency(bench, draw(row_charts(found, look)), draw)))
    if attention is None:
        body = paragraph(
            "Not given: `attnpred demo --attention FILE` writes it, `attnpred report --attention FILE` shows it."
        )
    else:
        body = draw(attention_pictures(attention))
    sections.append(("attention", "True against predicted attention", body))
    sections.append(("every-row", "Every row", _every_row(rows)))
    return Report(_page(sections, version), tuple(shown))


def _latency(bench: Bench | None, from_rows: str, draw: Callable[[Sequence[Picture]], str]) -> str:
    if bench is None:
        body = paragraph("Not measured beside the floor: `attnpred bench decode --json > FILE`, and `attnpred report --bench FILE`.")  # fmt: skip
    else:
        body = paragraph(MEANING) + (paragraph(f"Measured on: {bench.machine}.", "quiet") if bench.machine else "")
        body += draw(bench_charts(bench)) + bench_tables(bench)
    return body + from_rows


def _every_row(rows: Sequence[Row]) -> str:
    known = [key for key in FIGURES if any(row.raw.get(key) is not None for row in rows)]
    head = ["row", "policy", "budget", "task", "length", "model", "metric", "value and interval", "n", "difference from full cache"]  # fmt: skip
    lines = [
        [
            str(i), *map(escape, (
                row.policy, _budget(row), " ".join(filter(None, (row.task, row.text))), _plain(row.length), row.model, row.metric,
                measured(row), _plain(row.n), f"{difference(row.against)}, {verdict(row)}" if row.against else "not measured",
                *(_plain(row.raw.get(key)) for key in known),
            )),
            folded(f"row {i}", f"<pre>{escape(_configuration(row))}</pre>"),
        ]
        for i, row in enumerate(rows, start=1)
    ]  # fmt: skip
    head += [*(FIGURES[key] for key in known), "configuration"]
    made = table("rows", f"All {len(rows)} rows, as they were read", head, lines)
    return made.replace('class="scroll"', 'class="scroll rows"', 1)


def _configuration(row: Row) -> str:
    kept = {key: value for key, value in row.raw.items() if key not in NOT_SETTINGS and value is not None}
    lines = [f"{key}: {value if isinstance(value, str) else json.dumps(value)}" for key, value in kept.items()]
    return "\n".join(lines) or "nothing more is known"


def _budget(row: Row) -> str:
    return "all" if row.budget is None else f"{row.budget:g}"


def _plain(value: object) -> str:
    if value is None:
        return "not known"
    return f"{value:,}" if isinstance(value, int) else f"{value:,.4g}" if isinstance(value, float) else str(value)


def _page(sections: Sequence[tuple[str, str, str]], version: str) -> str:
    allowed = "; ".join(
        (
            "default-src 'none'",
            "img-src data:",
            f"style-src {_hash(STYLE)}",
            f"script-src {_hash(SCRIPT)}",
            "base-uri 'none'",
        )
    )
    links = "".join(f'<li><a href="#{name}">{escape(heading)}</a></li>' for name, heading, _ in sections)
    body = "\n".join(
        f'<section aria-labelledby="{name}"><h2 id="{name}">{escape(heading)}</h2>{inside}</section>'
        for name, heading, inside in sections
    )
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>attnpred: report</title>
<meta http-equiv="Content-Security-Policy" content="{allowed}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark"><link rel="icon" href="data:,">
<style>{STYLE}</style></head><body>
<a class="skip" href="#main">Skip to the summary</a>
<header><h1>Policies of a KV cache compared</h1>
<nav aria-label="Sections"><ul>{links}</ul></nav></header>
<main id="main">{body}</main>
<footer><p class="quiet">Made by attnpred report{escape(" " + version if version else "")}. This page holds everything it shows.</p></footer>
<script>{SCRIPT}</script></body></html>
"""


def _hash(content: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()}'"
