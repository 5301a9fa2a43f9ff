"""The results at one place: the table of policies and budgets, and the charts of quality against what it costs.

What a chart shows is said under it in one sentence.
"""

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from itertools import takewhile

from attnpred.report.charts import Axis, Level, Point, front, line_chart, scatter_chart, short
from attnpred.report.dots import dot_chart
from attnpred.report.leading import leading, ordered
from attnpred.report.look import Look
from attnpred.report.places import Column, Place, is_bound
from attnpred.report.rows import Row
from attnpred.report.summary import winners
from attnpred.report.svg import Picture
from attnpred.report.tables import Cell, Table, table
from attnpred.report.words import WITHIN, difference, listed, measured, number, verdict

FULL = "full cache"
COSTS = {
    "bytes_per_step": ("bytes read", "bytes read per decode step"),
    "ms_per_token": ("time", "milliseconds per token"),
    "fast_bytes": ("fast memory", "bytes in fast memory"),
}
"""What is drawn against; the first that was measured stands with the pictures that the page begins with."""
MANY = 8
"""Different values of a label, up to which it gets a table."""


def result_table(place: Place, name: str) -> Table:
    """Return the table: a line for each series, a column for each budget, and the full cache."""
    columns = place.columns
    best = {column: place.rivals(column)[0][1].value for column in columns if len(place.rivals(column)) > 1}
    lines: list[list[str | Cell]] = [[FULL, *[measured(place.full)] * len(columns)]] if place.full else []
    for series in place.series:
        cells = [place.cells.get((series, column)) for column in columns]
        lines.append([series, *(_cell(row, best.get(column)) for column, row in zip(columns, cells, strict=True))])
    direction = "lower" if place.lower_is_better else "higher"
    caption = f"{place.name}: {place.metric} ({direction} is better) with its 95 % interval, by policy and budget"
    if any(row.against for row in place.cells.values()):
        caption += "; below it the paired difference from the full cache with its interval"
    return table(name, caption, ["policy", *(column.words for column in columns)], lines)


def _cell(row: Row | None, best: float | None) -> Cell:
    if row is None:
        return Cell("not measured")
    note = f"{difference(row.against)} {verdict(row)}" if row.against is not None else ""
    return Cell(measured(row), note, is_best=row.value == best and not is_bound(row))


def against_budget(place: Place, look: Mapping[str, Look], name: str) -> list[Picture]:
    """Return the chart of quality against budget: in tokens if all budgets are, else in shares of the context."""
    tokens = all(column.budget > 1 for column in place.columns)
    series: dict[str, list[Point]] = defaultdict(list)
    ticks = {}
    for (label, column), row in place.cells.items():
        x = column.budget if tokens else row.share
        if x is not None:
            series[label].append(_point(x, label, column, row, place.full))
            ticks[x] = short(column.budget) if tokens else f"{100 * x:.3g} %"
    if not series:
        return []
    x_axis = Axis("budget: tokens" if tokens else "budget: share of the context", True, tuple(sorted(ticks.items())))
    level = Level(FULL, place.full.value, None if _is_paired(place) else place.full.interval) if place.full else None
    title = f"{place.name}: {place.metric} against budget"
    if len(ticks) == 1:
        sign = 1 if place.lower_is_better else -1
        dots = sorted(((label, points[0]) for label, points in series.items()), key=lambda dot: sign * dot[1].y)
        axis = Axis(f"{place.metric} at a budget of {next(iter(ticks.values()))}")
        return [dot_chart(name, title, _at_budgets(place), dots, look, axis, level)]
    own = frozenset(leading(place))
    return [line_chart(name, title, _at_budgets(place), series, look, x_axis, Axis(place.metric), level, own)]


def _at_budgets(place: Place) -> str:
    """Return who is best at how many budgets, and down to which it is like the full cache."""
    rivals = [column for column in place.columns if len(place.rivals(column)) > 1]
    won = Counter(name for column in rivals for name in winners(place, column))
    if not won:
        return f"{_better(place)}."
    most = max(won.values())
    best = [found for found in ordered([place]) if won[found] == most]
    who = listed(best) if len(best) < 4 else f"{best[0]} and {len(best) - 1} more"
    if len(rivals) == 1:
        said = f"{who} {'has' if len(best) == 1 else 'share'} the best mean at {rivals[0].words}"
    else:
        have = "has" if len(best) == 1 else "have"
        said = f"{who} {have} the best mean, alone or shared, at {most} of {len(rivals)} budgets"
    return f"{_better(place)}: {said}{_like_full(place, best[0], 'it' if len(best) == 1 else best[0])}."


def _like_full(place: Place, name: str, called: str) -> str:
    """Return down to which budget a series is within noise of the full cache; "" where that was not measured."""
    rows = [(column, place.cells.get((name, column))) for column in place.columns]
    compared = [(column.words, verdict(row)) for column, row in rows if row is not None and row.against is not None]
    if not compared:
        return ""
    like = [words for words, _ in takewhile(lambda pair: pair[1] == WITHIN, compared)]
    if not like:
        return f"; {called} is {compared[0][1]} than the full cache at {compared[0][0]}"
    return f"; {called} is within noise of the full cache {'down to' if len(like) > 1 else 'at'} {like[-1]}"


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
                point = _point(row.costs[cost], policy, column, row, place.full)
                series[policy].append(point)
                if policy not in bounds:
                    said[point] = FULL if row.is_full else f"{policy} at {column.words}"
        if len(said) < 2:
            continue
        best = front(list(said), place.lower_is_better)
        costs = [point.x for points in series.values() for point in points]
        axis = Axis(label, min(costs) > 0 and max(costs) > 4 * min(costs))
        title = f"{place.name}: {place.metric} against {key}"
        words = _cheapest(place, cost, label) or (
            f"{_better(place)}: the front goes from {said[best[0]]} to {said[best[-1]]}."
            if len(best) > 1
            else f"{_better(place)}: {said[best[0]]} is both cheapest and best."
        )
        own = frozenset(
            {FULL, *leading(place), *(label for label, points in series.items() if set(points) & set(best))}
        )
        drawn.append(
            scatter_chart(f"{name}-{cost}", title, words, series, look, axis, Axis(place.metric), place.lower_is_better, bounds, own)
        )  # fmt: skip
    return drawn


def _cheapest(place: Place, cost: str, label: str) -> str:
    """Return which policy costs least of those that are within noise of the full cache; "" where that is not known."""
    if place.full is None or cost not in place.full.costs:
        return ""
    like = [
        (row.costs[cost], name, column)
        for (name, column), row in place.cells.items()
        if cost in row.costs and verdict(row) == WITHIN and not is_bound(row)
    ]
    if not like:
        return ""
    least, name, column = min(like, key=lambda found: found[0])
    times = place.full.costs[cost] / least if least else 0.0
    much = f"{times:.1f} times fewer {label} than" if times >= 1 else f"more {label} than"
    if cost == "ms_per_token":
        much = f"{short(least)} milliseconds per token against {short(place.full.costs[cost])} of"
    return f"{_better(place)}: the cheapest within noise of the full cache is {name} at {column.words}, with {much} the full cache."


def label_tables(place: Place, name: str) -> list[Table]:
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
        lines = [[label, *(_mean(row, key, value) for value in ordered)] for label, row in cells.items()]
        caption = f"{place.name}: mean {place.metric} by {key}, without intervals; in brackets the number of items"
        head = ["policy", *(f"{key} {v}" for v in ordered)]
        tables.append(table(f"{name}-label{number_of}", caption, head, lines, "rows"))
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


def _point(x: float, series: str, column: Column, row: Row, full: Row | None) -> Point:
    """Return the point of a row; its whisker is that of the difference from `full`, where it was measured."""
    interval = row.interval
    if full is not None and row.against is not None:
        interval = full.value + row.against.low, full.value + row.against.high
    at = "" if row.is_full else f", {column.words}"
    return Point(x, row.value, interval, f"{series}{at}: {measured(row)}")


def _is_paired(place: Place) -> bool:
    return any(row.against is not None for row in place.cells.values())


def _better(place: Place) -> str:
    return f"{'Lower' if place.lower_is_better else 'Higher'} is better"


def names(found: Sequence[Place]) -> list[str]:
    """Return all series of all places, ours first, the full cache last: the order of colours and letters."""
    return [*ordered(found), FULL]
