"""Needle heat maps: what was found, by the depth of the needle and the length of the text, one for each policy and budget.

Depth is a label of items, a share of the text from its beginning; more than `MOST` different depths are put into tenths.
"""

from collections import defaultdict
from collections.abc import Sequence
from statistics import fmean

from attnpred.checks import is_finite
from attnpred.report.heat import grid_chart
from attnpred.report.places import Column, Place
from attnpred.report.results import FULL
from attnpred.report.rows import Row
from attnpred.report.svg import Picture
from attnpred.report.words import counted

MOST = 11


def needle_maps(found: Sequence[Place]) -> list[Picture]:
    """Return the heat maps of all places whose items have a depth; lengths of a task stand side by side."""
    groups: dict[tuple[str, str, str, str], dict[str, list[Row]]] = defaultdict(lambda: defaultdict(list))
    for place in found:
        cells = [(FULL, place.full)] if place.full else []
        cells += [(f"{series} at {column.words}", row) for (series, column), row in _by_policy(place)]
        for label, row in cells:
            if row.length and any(is_finite(item.labels.get("depth")) for item in row.items):
                groups[place.task, place.model, place.text, place.metric][label].append(row)
    drawn: list[Picture] = []
    for (task, model, text, metric), series in groups.items():
        depth = _depths([row for rows in series.values() for row in rows])
        for label, rows in series.items():
            title = ", ".join(filter(None, (f"{task}: {label}", text, model)))
            drawn.append(_map(f"needle{len(drawn)}", title, metric, rows, depth))
    return drawn


def _by_policy(place: Place) -> list[tuple[tuple[str, Column], Row]]:
    return sorted(place.cells.items(), key=lambda cell: place.series.index(cell[0][0]))


def _depths(rows: Sequence[Row]) -> dict[float, float]:
    """Return the line on which each depth is drawn: itself, or its tenth."""
    found = {item.labels["depth"] for row in rows for item in row.items if is_finite(item.labels.get("depth"))}
    return {depth: depth if len(found) <= MOST else int(10 * depth + 1e-9) / 10 for depth in found}


def _map(name: str, title: str, metric: str, rows: Sequence[Row], depth: dict[float, float]) -> Picture:
    values: dict[tuple[float, int], list[float]] = defaultdict(list)
    for row in rows:
        for item in row.items:
            if is_finite(item.labels.get("depth")) and row.length:
                values[depth[item.labels["depth"]], row.length].append(item.value)
    down = sorted({place for place, _ in values})
    across = sorted({length for _, length in values})
    means = {(down.index(place), across.index(length)): fmean(own) for (place, length), own in values.items()}
    shares = all(value <= 1 for value in down)
    lines = [f"{100 * value:.3g} %" if shares else f"{value:g}" for value in down]
    counts = sorted({len(own) for own in values.values()})
    items = counted(counts[0], "item") if len(counts) == 1 else f"{counts[0]} to {counts[-1]} items"
    tenths = " Depths are put into tenths: 10 % is from 10 % to 20 %." if set(depth) - set(depth.values()) else ""
    words = (
        f"Mean {metric}, {items} in a cell; least {min(means.values()):.2f}, most {max(means.values()):.2f}. The figure "
        f"in a cell is its mean; brighter is more.{tenths}"
    )
    columns = [f"{length:,}" for length in across]
    return grid_chart(name, title, words, lines, columns, means, max(1.0, *means.values()), ("depth", "tokens"))
