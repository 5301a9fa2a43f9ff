"""Latency against context: what `attnpred bench decode` measured beside the floor and the dense paths, and what rows say."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from attnpred.checks import is_finite
from attnpred.errors import ConfigError
from attnpred.reading import JSON_BYTES, parse_json, read_text
from attnpred.report.charts import Axis, Point, line_chart, short
from attnpred.report.leading import leading
from attnpred.report.look import Look, looks
from attnpred.report.places import Column, Place
from attnpred.report.results import FULL
from attnpred.report.svg import Picture
from attnpred.report.tables import Table, table
from attnpred.report.words import number

KEYS = ("shape", "dtype", "context", "variant", "ms_per_token")
ORDER = ("predicted", "floor", "transformers", "packed", "dense")
MEANING = (
    "floor: the same model with its attention removed, which no cache can beat. transformers: as it comes. packed and dense: "
    "our own attention over the whole cache. predicted: a part of the cache."
)
MACHINE = ("cpu", "gpu", "device", "threads", "torch", "transformers", "commit")


@dataclass(frozen=True, slots=True)
class Timed:
    """One measured time; spread: lowest and highest of its repetitions."""

    group: str
    variant: str
    context: int
    ms: float
    spread: tuple[float, float] | None


@dataclass(frozen=True, slots=True)
class Bench:
    """What a file of `attnpred bench decode` holds, and on what machine it was made."""

    rows: tuple[Timed, ...]
    machine: str


def read_bench(path: Path) -> Bench:
    """Read the JSON object that `attnpred bench decode --json` prints last. Raises `ConfigError`."""
    expected = "the JSON object of `attnpred bench decode --json`"
    text = read_text(path, expected, JSON_BYTES).strip()
    last = text.rpartition("\n")[2]  # after what a run without --json printed
    found: Any = parse_json(last if last.startswith("{") and last != "{" else text, path, expected)
    rows = found.get("rows") if isinstance(found, dict) else None
    if not isinstance(rows, list) or not rows:
        raise ConfigError(f"got {path} without 'rows', expected {expected}")
    made = []
    for i, row in enumerate(rows):
        missing = [key for key in KEYS if not isinstance(row, dict) or key not in row]
        if missing:
            raise ConfigError(f"got {path} with rows[{i}] without {missing[0]!r}, expected the keys {', '.join(KEYS)}")
        for key in ("context", "ms_per_token"):
            if not is_finite(row[key]) or row[key] <= 0:
                raise ConfigError(f"got {path} with rows[{i}] {key}={row[key]!r}, expected a number above 0")
        spread = row.get("spread")
        if spread is not None and not (isinstance(spread, list) and len(spread) == 2 and all(map(is_finite, spread))):
            raise ConfigError(f"got {path} with rows[{i}] spread={spread!r}, expected two numbers")
        made.append(
            Timed(f"{row['shape']}, {row['dtype']}", str(row["variant"]), int(row["context"]), row["ms_per_token"],
                  (spread[0], spread[1]) if spread else None)
        )  # fmt: skip
    machine = ", ".join(f"{key} {found[key]}" for key in MACHINE if isinstance(found.get(key), (str, int)))
    return Bench(tuple(made), machine)


def bench_charts(bench: Bench) -> list[Picture]:
    """Return a chart for every shape that was measured at two contexts or more."""
    drawn: list[Picture] = []
    for group, variants in _groups(bench).items():
        series = {
            name: [Point(t.context, t.ms, t.spread, f"{name}, {t.context:,} tokens: {number(t.ms)} ms") for t in rows]
            for name, rows in variants.items()
        }
        contexts = sorted({t.context for rows in variants.values() for t in rows})
        if len(contexts) > 1:
            words = "Lower is better. Both axes are logarithmic; whiskers span the repetitions."
            x = Axis(
                "tokens of context", True, tuple((c, f"{c // 1024}K" if c % 1024 == 0 else f"{c:,}") for c in contexts)
            )
            drawn.append(
                line_chart(f"bench{len(drawn)}", f"{group}: decode latency against context", words, series,
                           looks(series), x, Axis("milliseconds per token", True))
            )  # fmt: skip
    return drawn


def bench_tables(bench: Bench) -> list[Table]:
    """Return a table for each shape: variants by context."""
    made = []
    for i, (group, variants) in enumerate(_groups(bench).items()):
        contexts = sorted({t.context for rows in variants.values() for t in rows})
        lines = [
            [name, *(next((_timed(t) for t in rows if t.context == c), "not measured") for c in contexts)]
            for name, rows in variants.items()
        ]
        caption = f"{group}: milliseconds per token, in brackets the span of the repetitions, by tokens of context"
        made.append(table(f"bench-table{i}", caption, ["variant", *(f"{c:,}" for c in contexts)], lines))
    return made


def row_charts(found: Sequence[Place], look: Mapping[str, Look]) -> list[Picture]:
    """Return milliseconds per token against length, as the rows have them, for each task and budget with two lengths."""
    groups: dict[tuple[str, str, str, Column], dict[str, dict[int, float]]] = defaultdict(lambda: defaultdict(dict))
    for place in found:
        for (policy, column), row in place.cells.items():
            if place.length and "ms_per_token" in row.costs:
                own = groups[place.task, place.text, place.model, column]
                own[policy][place.length] = row.costs["ms_per_token"]
                if place.full and "ms_per_token" in place.full.costs:
                    own[FULL][place.length] = place.full.costs["ms_per_token"]
    drawn: list[Picture] = []
    for (task, text, model, column), times in groups.items():
        lengths = sorted({length for own in times.values() for length in own})
        if len(lengths) < 2:
            continue
        title = ", ".join(filter(None, (task, text, model, f"budget {column.words}"))) + ": latency against length"
        series = {
            name: [Point(x, ms, None, f"{name}, {x:,} tokens: {number(ms)} ms") for x, ms in own.items()]
            for name, own in times.items()
        }
        axis = Axis("tokens", True, tuple((length, f"{length:,}") for length in lengths))
        words = "Lower is better. As the rows have it: the median over the tokens of all answers, without an interval."
        place = next(place for place in found if (place.task, place.text, place.model) == (task, text, model))
        y = Axis("milliseconds per token", True)
        leads = frozenset({FULL, *leading(place)})
        drawn.append(line_chart(f"latency{len(drawn)}", title, words, series, look, axis, y, own=leads))
    return drawn


def _groups(bench: Bench) -> dict[str, dict[str, list[Timed]]]:
    found: dict[str, dict[str, list[Timed]]] = defaultdict(lambda: defaultdict(list))
    for timed in sorted(bench.rows, key=lambda t: ORDER.index(t.variant) if t.variant in ORDER else len(ORDER)):
        found[timed.group][timed.variant].append(timed)
    return found


def _timed(timed: Timed) -> str:
    span = f" [{short(timed.spread[0])}, {short(timed.spread[1])}]" if timed.spread else ""
    return short(timed.ms) + span
