"""A dot for each policy on a line of its own, best above: what a chart against the budget becomes where there is one budget.

Names stand at the left, long ones without their middle; the dashed line across is the full cache.
"""

from collections.abc import Mapping, Sequence

from attnpred.report.charts import LETTER, Axis, Level, Point, short
from attnpred.report.look import Look
from attnpred.report.svg import WIDTH, Picture, around, mark, picture, tag, words_at

RIGHT, TOP, LINE = 12.0, 16.0, 16.0
NAMES = 32
"""Letters of a name that are shown."""


def dot_chart(
    name: str, title: str, words: str, points: Sequence[tuple[str, Point]], look: Mapping[str, Look], axis: Axis,
    level: Level | None = None,
) -> Picture:  # fmt: skip
    """Draw the `y` of each point with its interval; the first is above."""
    values = [value for _, point in points for value in (point.y, *(point.interval or ()))]
    values += [level.y, *(level.interval or ())] if level else []
    left = LETTER * min(NAMES, max(len(label) for label, _ in points)) + 16
    place = around(values, left, WIDTH - RIGHT)
    bottom = TOP + LINE * len(points)
    body = []
    for value in place.ticks(5):
        x = place(value)
        body.append(tag("line", x1=x, x2=x, y1=TOP - 4, y2=bottom, class_="line thin"))
        body.append(words_at(x, bottom + 13, short(value), class_="middle"))
    body.append(words_at((left + WIDTH - RIGHT) / 2, bottom + 28, axis.label, class_="middle quiet"))
    if level is not None:
        x = place(level.y)
        body.append(tag("line", x1=x, x2=x, y1=TOP - 4, y2=bottom, class_="dashed"))
        body.append(words_at(x, TOP - 6, level.name, class_="middle" if x < WIDTH - 50 else "end"))
    for i, (label, point) in enumerate(points):
        y = TOP + LINE * (i + 0.5)
        body.append(words_at(left - 8, y + 4, _shortened(label), class_="end"))
        drawn = mark(look[label].marker, place(point.y), y, point.note)
        if point.interval is not None:
            low, high = (place(value) for value in point.interval)
            drawn = tag("path", d=f"M{low:.1f} {y:.1f}H{high:.1f}M{low:.1f} {y - 2:.1f}v4M{high:.1f} {y - 2:.1f}v4", class_="thin faint") + drawn  # fmt: skip
        body.append(tag("g", drawn, class_=look[label].colour))
    return picture(name, title, words, bottom + 34, "".join(body))


def _shortened(label: str) -> str:
    half = NAMES // 2
    return label if len(label) <= NAMES else f"{label[: half - 1]}…{label[-half:]}"
