"""The report: one HTML page that needs nothing else, no network and no script, and its charts as files for papers.

Pictures come first, tables behind them. The page is `page.html.jinja`, which escapes every word. It says so itself: its
content security policy allows the style and the script that it holds, by their hashes, and images inside it, and nothing
else. So a word in a row that looks like markup could do nothing even unescaped.
"""

import base64
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template

from attnpred.report.attention import HeadAttention, attention_pictures
from attnpred.report.latency import MEANING, Bench, bench_charts, bench_tables, row_charts
from attnpred.report.look import Look, looks
from attnpred.report.needles import needle_maps
from attnpred.report.places import Place, places
from attnpred.report.results import against_budget, against_cost, label_tables, names, result_table
from attnpred.report.rows import Row
from attnpred.report.style import SCRIPT, STYLE
from attnpred.report.summary import best_table, lead, notes, policy_table
from attnpred.report.svg import Picture
from attnpred.report.tables import Cell, Table, table
from attnpred.report.words import difference, measured, verdict
from attnpred.row_check import CHECK

OPEN = 4
"""Places that are shown unfolded."""
FEW = 6
"""Maps of needles that are."""
HEADINGS = {
    "pictures": "Quality against budget and cost",
    "needles": "Needles by depth and length",
    "latency": "Latency against context",
    "attention": "True against predicted attention",
    "tables": "Tables",
    "every-row": "Every row",
}
HOW_TO_READ = (
    "Whiskers are the 95 % intervals of differences from the full cache, item by item; where these were not measured, those of "
    "the means. A letter stands at the end of its line, and the full cache is dashed. Ringed is the Pareto front, by the means "
    "alone: nothing is both cheaper and better. Grey are policies that have no line of their own; the tables have them all."
)
NO_BENCH = "Not measured beside the floor: `attnpred bench decode --json > FILE`, and `attnpred report --bench FILE`."
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


@dataclass(frozen=True, slots=True)
class Shown:
    """What the page has of a place: the pictures it begins with, the tables behind them, and more pictures there."""

    heading: str
    first: tuple[Picture, ...]
    more: tuple[Picture, ...]
    tables: tuple[Table, ...]


def build(
    rows: Sequence[Row], bench: Bench | None = None, attention: HeadAttention | None = None, version: str = ""
) -> Report:
    """Return the report on `rows`, at least one; the same for the same arguments."""
    found = places(rows)
    look = looks(names(found))
    shown = [_shown(place, look, i) for i, place in enumerate(found)]
    pictured = [one for one in shown if one.first]
    needles, times = needle_maps(found), [*(bench_charts(bench) if bench else ()), *row_charts(found, look)]
    said = [MEANING, *([f"Measured on: {bench.machine}."] if bench.machine else [])] if bench else [NO_BENCH]
    heads = attention_pictures(attention) if attention else []
    html = _template().render(
        allowed=_allowed(),
        style=STYLE,
        script=SCRIPT,
        version=version,
        headings=HEADINGS,
        links=[(name, heading) for name, heading in HEADINGS.items() if needles or name != "needles"],
        how_to_read=HOW_TO_READ,
        lead=lead(rows),
        notes=notes(rows, found),
        places=shown,
        pictured=pictured,
        open=OPEN,
        needles=needles,
        few=FEW,
        latency={"words": said, "pictures": times, "tables": bench_tables(bench) if bench else ()},
        attention=heads,
        policies=policy_table(found),
        every_row=_every_row(rows),
    )
    drawn = [*(made for one in shown for made in (*one.first, *one.more)), *needles, *times, *heads]
    return Report(html, tuple(drawn))


@cache
def _template() -> Template:
    made = Environment(loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined)
    return made.get_template("page.html.jinja")


def _shown(place: Place, look: dict[str, Look], number: int) -> Shown:
    costs = against_cost(place, look, f"cost{number}")
    return Shown(
        f"{place.name}: {place.metric}",
        (*against_budget(place, look, f"budget{number}"), *costs[:1]),
        tuple(costs[1:]),
        (
            best_table(place, f"best{number}"),
            result_table(place, f"results{number}"),
            *label_tables(place, f"results{number}"),
        ),
    )


def _every_row(rows: Sequence[Row]) -> Table:
    known = [key for key in FIGURES if any(row.raw.get(key) is not None for row in rows)]
    head = ["policy", "budget", "task", "length", "model", "metric", "value and interval", "n", "difference from full cache"]  # fmt: skip
    lines: list[list[str | Cell]] = [
        [
            row.policy, _budget(row), " ".join(filter(None, (row.task, row.text))), _plain(row.length), row.model, row.metric,
            measured(row), _plain(row.n), f"{difference(row.against)}, {verdict(row)}" if row.against else "not measured",
            *(_plain(row.raw.get(key)) for key in known), Cell(f"row {i}", folded=_configuration(row)),
        ]
        for i, row in enumerate(rows, start=1)
    ]  # fmt: skip
    head += [*(FIGURES[key] for key in known), "configuration"]
    return table("rows", f"All {len(rows)} rows, as they were read", head, lines, "rows")


def _configuration(row: Row) -> str:
    kept = {key: value for key, value in row.raw.items() if key not in NOT_SETTINGS and value is not None}
    lines = [f"{key}: {value if isinstance(value, str) else json.dumps(value)}" for key, value in kept.items()]
    return "\n".join(lines) or "nothing more is known"


def _budget(row: Row) -> str:
    return "all" if row.budget is None else f"{row.budget:g}"


def _plain(value: Any) -> str:
    if value is None:
        return "not known"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 10_000 else f"{value:,.4g}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def _allowed() -> str:
    return f"default-src 'none'; img-src data:; style-src {_hash(STYLE)}; script-src {_hash(SCRIPT)}; base-uri 'none'"


def _hash(content: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()}'"
