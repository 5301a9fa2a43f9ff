"""The results at one place: the table of policies and budgets, and the charts of quality against what it costs."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from html import escape

from attnpred.report.charts import Axis, Level, Point, front, line_chart, scatter_chart, short
from attnpred.report.look import Look
from attnpred.report.markup import table
from attnpred.report.places import Column, Place, is_bound
from attnpred.report.rows import Row
from attnpred.report.svg import Picture
from attnpred.report.words import difference, listed, measured, number, verdict

FULL = "full cache"
COSTS = {
    "ms_per_token": ("time", "milliseconds per token"),
    "bytes_per_step": ("bytes read", "bytes read per decode step"),
    "fast_bytes": ("fast memory", "bytes in fast memory"),
}
MANY = 8
"""Different values of a label, up to which it gets a table."""


def result_table(place: Place, name: str) -> str:
    """Return the table: a line for each series, a column for each budget, and the full cache."""
    columns = place.columns
    best = {column: place.rivals(column)[0][1].value for column in columns if len(place.rivals(column)) > 1}
    lines = [[FULL, *[escape(measured(place.full))] * len(columns)]] if place.full else []
    for series in place.series:
        cells = [place.cells.get((series, column)) for column in columns]
        lines.append(
            [escape(series), *(_cell(row, best.get(column)) for column, row in zip(columns, cells, strict=True))]
        )
    direction = "lower" if place.lower_is_better else "higher"
    caption = f"{place.name}: {place.metric} ({direction} is better) with its 95 % interval, by policy and budget"
    if any(row.against for row in place.cells.values()):
        caption += "; below it the paired difference from the full cache with its interval"
    return table(name, caption, ["policy", *(column.words for column in columns)], lines)


def _cell(row: Row | None, best: float | None) -> str:
    if row is None:
        return "not measured"
    words = escape(measured(row))
    if row.value == best and not is_bound(row):
        words = f"<b>{words} best</b>"
    if row.against is not None:
        words += f"<br><small>{escape(difference(row.against))} {verdict(row)}</small>"
    return words


def against_budget(place: Place, look: Mapping[str, Look], name: str) -> list[Picture]:
    """Return the chart of quality against budget: in tokens if all budgets are, else in shares of the context."""
    tokens = all(column.budget > 1 for column in place.columns)
    series: dict[str, list[Point]] = defaultdict(list)
    ticks = {}
    for (label, column), row in place.cells.items():
        x = column.budget if tokens else row.share
        if x is not None:
            series[label].append(_point(x, label, column, row))
            ticks[x] = short(column.budget) if tokens else f"{100 * x:.3g} %"
    if not series:
        return []
    x_axis = Axis("budget: tokens" if tokens else "budget: share of the context", True, tuple(sorted(ticks.items())))
    level = Level(FULL, place.full.value, place.full.interval) if place.full else None
    words = f"{_better(place)} Whiskers: 95 % intervals." + (" Dashed: the full cache." if level else "")
    return [line_chart(name, f"{place.name}: {place.metric} against budget", words, series, look, x_axis, Axis(place.metric), level)]  # fmt: skip


def against_cost(place: Place, look: Mapping[str, Look], name: str) -> list[Picture]:
    """Return a chart for each cost that was measured: every row a point, the Pareto front marked.

    The oracle is drawn, but is not on the front: it knows what nobody can know before.
    """
    cells = [(series, column, row) for (series, column), row in place.cells.items()]
    cells += [(FULL, Column(1.0), place.full)] if place.full else []
    bounds = frozenset(series for series, _, row in cells if is_bound(row))
    drawn = []
    for cost, (key, label) in COSTS.items():
        series: dict[str, list[Point]] = defaultdict(list)
        said: dict[Point, str] = {}
        for policy, column, row in cells:
            if cost in row.costs:
                point = _point(row.costs[cost], policy, column, row)
                series[policy].append(point)
                if policy not in bounds:
                    at = FULL if row.is_full else f"{policy} at {column.words}"
                    said[point] = f"{at} ({short(point.x)}: {measured(row)})"
        if len(said) < 2:
            continue
        words = (
            f"{_better(place)} Ringed: the Pareto front, by the means alone, than which nothing is both cheaper and better: "
            f"{listed([said[point] for point in front(list(said), place.lower_is_better)])}. Whiskers: 95 % intervals."
            + (" The oracle cannot be on it." if bounds & set(series) else "")
        )
        costs = [point.x for points in series.values() for point in points]
        axis = Axis(label, min(costs) > 0 and max(costs) > 4 * min(costs))
        title = f"{place.name}: {place.metric} against {key}"
        drawn.append(
            scatter_chart(
                f"{name}-{cost}", title, words, series, look, axis, Axis(place.metric), place.lower_is_better, bounds
            )
        )
    return drawn


def label_tables(place: Place, name: str) -> list[str]:
    """Return a table for each label of items that has a few values (turn, hops ...): means, and the number of items."""
    cells = {f"{series} at {column.words}": row for (series, column), row in place.cells.items()}
    cells = ({FULL: place.full} if place.full else {}) | cells
    keys = dict.fromkeys(key for row in cells.values() for item in row.items for key in item.labels)
    tables = []
    for number_of, key in enumerate(key for key in keys if key != "depth"):
        values = {str(item.labels[key]) for row in cells.values() for item in row.items if key in item.labels}
        if not 2 <= len(values) <= MANY:
            continue
        ordered = in_order(values)
        lines = [[escape(label), *(_mean(row, key, value) for value in ordered)] for label, row in cells.items()]
        caption = f"{place.name}: mean {place.metric} by {key}, without intervals; in brackets the number of items"
        tables.append(table(f"{name}-label{number_of}", caption, ["policy", *(f"{key} {v}" for v in ordered)], lines))
    return tables


def in_order(values: set[str]) -> list[str]:
    """Return values by number where all are numbers, else by name."""
    try:
        return sorted(values, key=float)
    except ValueError:
        return sorted(values)


def _mean(row: Row, key: str, value: str) -> str:
    own = [item.value for item in row.items if str(item.labels.get(key)) == value]
    return f"{number(sum(own) / len(own))} ({len(own)})" if own else "none"


def _point(x: float, series: str, column: Column, row: Row) -> Point:
    at = "" if row.is_full else f", {column.words}"
    return Point(x, row.value, row.interval, f"{series}{at}: {measured(row)}")


def _better(place: Place) -> str:
    return f"{'Lower' if place.lower_is_better else 'Higher'} is better."


def names(found: Sequence[Place]) -> list[str]:
    """Return all series of all places, ours first, the full cache last: the order of colours and letters."""
    every = list(dict.fromkeys(name for place in found for name in place.series))
    return [*sorted(every, key=lambda name: (name != "predicted", not name.startswith("predicted"))), FULL]
