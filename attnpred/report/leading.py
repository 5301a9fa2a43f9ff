"""Which policies of a place have a line of their own in its charts: more than a few cannot be told apart in a picture.

Where there are too many, it is the best setting of each policy, by the mean of its rank at each budget, and of those the
best; `predicted` always, which is what the others are compared with, and so is the oracle, which is what is possible.
"""

import re
from collections.abc import Sequence

from attnpred.report.places import Place, is_bound

MOST = 7
"""Lines of a chart beside `predicted` or the oracle: as many as there are colours."""
OURS = "predicted"


def leading(place: Place) -> list[str]:
    """Return the series of a place that are drawn in colour, in the order in which the place has them."""
    if len(place.series) <= MOST + 1:
        return place.series
    bounds = {name for (name, _), row in place.cells.items() if is_bound(row)}
    own = [OURS] if OURS in place.series else []
    best: dict[str, str] = {}
    for name in [*own, *_by_rank(place)]:
        best.setdefault(_policy(name), name)
    kept = {*list(best.values())[:MOST], *own, *bounds}
    return [name for name in place.series if name in kept]


def ordered(found: Sequence[Place]) -> list[str]:
    """Return all series of all places: ours, then those that are drawn in colour most often; the order of colours."""
    every = list(dict.fromkeys(name for place in found for name in place.series))
    drawn = [name for place in found for name in leading(place)]
    return sorted(every, key=lambda name: (name != OURS, -drawn.count(name)))


def _by_rank(place: Place) -> list[str]:
    columns = [[name for name, _ in place.rivals(column)] for column in place.columns]
    names = {name for column in columns for name in column}
    ranks = {name: sum(col.index(name) if name in col else len(names) for col in columns) for name in names}
    return sorted(names, key=lambda name: (ranks[name], place.series.index(name)))


def _policy(name: str) -> str:
    return re.split("[: ]", name)[0]
