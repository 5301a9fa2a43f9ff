"""The charts: lines with intervals, points with their Pareto front, and the legend that both have inside.

A legend stands below its chart, in the same picture: it needs no room at the side, so a chart is as wide as a phone.
The letter of a series stands at the end of its line. Whiskers are intervals, moved aside a little where they would cover
each other; among points only those on the front have one.
"""

import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from attnpred.report.look import Look
from attnpred.report.svg import WIDTH, Picture, Scale, around, mark, picture, tag, words_at
from attnpred.report.words import counted

LEFT, RIGHT, TOP, PLOT = 46, 22, 24, 205
LETTER = 6.1
"""Width of a letter of the legend, about."""


@dataclass(frozen=True, slots=True)
class Point:
    """One measured value with its interval (None: not known) and a note for the mouse."""

    x: float
    y: float
    interval: tuple[float, float] | None = None
    note: str = ""


@dataclass(frozen=True, slots=True)
class Level:
    """A value that does not depend on x: the full cache."""

    name: str
    y: float
    interval: tuple[float, float] | None = None


@dataclass(frozen=True, slots=True)
class Axis:
    """What an axis shows. ticks: values and their words, "" for round ones."""

    label: str
    log: bool = False
    ticks: tuple[tuple[float, str], ...] = ()


def line_chart(
    name: str, title: str, words: str, series: Mapping[str, Sequence[Point]], look: Mapping[str, Look], x: Axis, y: Axis,
    level: Level | None = None, own: frozenset[str] | None = None,
) -> Picture:  # fmt: skip
    """Draw a line for each of `series`, its points in order of x; `level` is a dashed line across.

    own: the series with a colour and a letter of their own, left out: all. The others are grey lines.
    """
    frame = _Frame.around([p for points in series.values() for p in points], x, y, level)
    body = [frame.axes(x, y)]
    if level is not None:
        body.append(frame.level(level))
    series, others = _parted(series, own)
    for points in others.values():
        body.append(tag("path", d=_path(frame, sorted(points, key=lambda p: p.x)), class_="line thin"))
    for i, (label, points) in enumerate(series.items()):
        aside = (i - (len(series) - 1) / 2) * min(3.0, 16 / len(series))
        places = [(frame.x(p.x) + aside, frame.y(p.y), p) for p in sorted(points, key=lambda p: p.x)]
        drawn = tag("path", d="M" + "L".join(f"{px:.1f} {py:.1f}" for px, py, _ in places))
        drawn += "".join(frame.whisker(px, p) + mark(look[label].marker, px, py, p.note) for px, py, p in places)
        body.append(tag("g", drawn, class_=look[label].colour))
    ends = sorted((frame.y(max(points, key=lambda p: p.x).y), label) for label, points in series.items())
    ordered = spread([-py for py, _ in ends], 11, -TOP)
    for place, (_, label) in zip(ordered, ends, strict=True):
        body.append(words_at(WIDTH - RIGHT + 6.0, -place + 4, look[label].letter, class_="bold"))
    legend, height = _legend(list(series), look, frame.bottom, level, others=len(others))
    return picture(name, title, words, height, "".join(body) + legend)


def front(points: Sequence[Point], lower_is_better: bool) -> list[Point]:
    """Return the points that no other one beats: none is as cheap (x) and as good (y) and better in one; cheapest first."""
    sign = 1 if lower_is_better else -1
    found: list[Point] = []
    for point in sorted(points, key=lambda p: (p.x, sign * p.y)):
        if not found or sign * point.y < sign * found[-1].y:
            found.append(point)
    return found


def scatter_chart(
    name: str, title: str, words: str, series: Mapping[str, Sequence[Point]], look: Mapping[str, Look], x: Axis, y: Axis,
    lower_is_better: bool = False, outside: frozenset[str] = frozenset(), own: frozenset[str] | None = None,
) -> Picture:  # fmt: skip
    """Draw every point; those on the Pareto front have a ring and their letter, and a dashed line joins them.

    outside: series that are drawn, but cannot be on the front. own: as for `line_chart`; the others are grey points.
    """
    best = front([p for name, points in series.items() if name not in outside for p in points], lower_is_better)
    every = [p for points in series.values() for p in points]
    frame = _Frame.around([p if p in best else replace(p, interval=None) for p in every], x, y, None)
    steps = "".join(
        f"{'M' if i == 0 else 'H'}{frame.x(p.x):.1f}{f' {frame.y(p.y):.1f}' if i == 0 else f'V{frame.y(p.y):.1f}'}"
        for i, p in enumerate(best)
    )
    body = [frame.axes(x, y), tag("path", d=steps, class_="quiet thin dashed")]
    series, others = _parted(series, own)
    for p in (p for points in others.values() for p in points):
        note = tag("title", html.escape(p.note))
        body.append(tag("circle", note, cx=frame.x(p.x), cy=frame.y(p.y), r=1.8, class_="line solid"))
    for label, points in series.items():
        drawn = "".join(
            (frame.whisker(frame.x(p.x), p) if p in best else "")
            + mark(look[label].marker, frame.x(p.x), frame.y(p.y), p.note)
            for p in points
        )
        body.append(tag("g", drawn, class_=look[label].colour))
    for label, points in series.items():
        for p in points:
            if p in best:
                px, py = frame.x(p.x), frame.y(p.y)
                body.append(tag("circle", cx=px, cy=py, r=8, class_="ring"))
                body.append(words_at(px, py - 11, look[label].letter, class_="middle bold halo"))
    legend, height = _legend(list(series), look, frame.bottom, None, ring=True, others=len(others))
    return picture(name, title, words, height, "".join(body) + legend)


def _parted(
    series: Mapping[str, Sequence[Point]], own: frozenset[str] | None
) -> tuple[dict[str, Sequence[Point]], dict[str, Sequence[Point]]]:
    """Return the series that have a look of their own, and the others."""
    mine = {name: points for name, points in series.items() if own is None or name in own}
    return mine, {name: points for name, points in series.items() if name not in mine}


def _path(frame: "_Frame", points: Sequence[Point]) -> str:
    return "M" + "L".join(f"{frame.x(p.x):.1f} {frame.y(p.y):.1f}" for p in points)


@dataclass(frozen=True, slots=True)
class _Frame:
    """Where values lie in the picture."""

    x: Scale
    y: Scale

    @classmethod
    def around(cls, points: Sequence[Point], x: Axis, y: Axis, level: Level | None) -> "_Frame":
        values = [v for p in points for v in (p.y, *(p.interval or ()))]
        values += [level.y, *(level.interval or ())] if level else []
        across = [p.x for p in points]
        return cls(
            around(across, LEFT, WIDTH - RIGHT, x.log),
            around(values, TOP + PLOT, TOP, y.log and min(values) > 0),
        )

    @property
    def bottom(self) -> float:
        return TOP + PLOT + 40.0

    def axes(self, x: Axis, y: Axis) -> str:
        drawn = []
        for value in self.y.ticks():
            py = self.y(value)
            drawn.append(tag("line", x1=LEFT, x2=WIDTH - RIGHT, y1=py, y2=py, class_="line thin"))
            drawn.append(words_at(LEFT - 6, py + 4, short(value), class_="end"))
        last = -1e9
        for value, words in x.ticks or [(value, short(value)) for value in self.x.ticks()]:
            px = self.x(value)
            drawn.append(tag("line", x1=px, x2=px, y1=TOP + PLOT, y2=TOP + PLOT + 4, class_="quiet thin"))
            if (
                px - last > LETTER * len(words) + 5
            ):  # a name that would touch the one before is left out; its tick is not
                drawn.append(words_at(px, TOP + PLOT + 17, words, class_="middle"))
                last = px
        drawn.append(tag("line", x1=LEFT, x2=WIDTH - RIGHT, y1=TOP + PLOT, y2=TOP + PLOT, class_="quiet thin"))
        drawn.append(words_at((LEFT + WIDTH - RIGHT) / 2, TOP + PLOT + 33, x.label, class_="middle quiet"))
        drawn.append(words_at(2, 10, y.label, class_="quiet"))
        return "".join(drawn)

    def level(self, level: Level) -> str:
        py = self.y(level.y)
        drawn = tag("line", x1=LEFT, x2=WIDTH - RIGHT, y1=py, y2=py, class_="dashed")
        return drawn + (self.whisker(LEFT + 4, Point(0, level.y, level.interval)) if level.interval else "")

    def whisker(self, px: float, point: Point) -> str:
        if point.interval is None:
            return ""
        low, high = (self.y(v) for v in point.interval)
        return tag("path", d=f"M{px:.1f} {low:.1f}V{high:.1f}M{px - 2:.1f} {low:.1f}h4M{px - 2:.1f} {high:.1f}h4", class_="thin faint")  # fmt: skip


def _legend(
    names: Sequence[str], look: Mapping[str, Look], top: float, level: Level | None, ring: bool = False, others: int = 0
) -> tuple[str, float]:
    """Return the legend, as many names in a line as fit, and where it ends."""
    drawn = []
    x, y = 8.0, top + 10
    entries = [(f"{look[name].letter}  {name}", tag("g", mark(look[name].marker, 0, 0), class_=look[name].colour)) for name in names]  # fmt: skip
    if level is not None:
        entries.append((level.name, tag("line", x1=-8, x2=6, y1=0, y2=0, class_="dashed")))
    if ring:
        entries.append(("on the Pareto front", tag("circle", cx=0, cy=0, r=6, class_="ring")))
    if others:
        entries.append(
            (counted(others, "more policy", "more policies"), tag("line", x1=-8, x2=6, y1=0, y2=0, class_="line wide"))
        )
    for words, key in entries:
        most = int((WIDTH - 40) / LETTER)
        shown = words if len(words) <= most else words[: most - 1] + "…"
        wide = LETTER * len(shown) + 30
        if x > 8 and x + wide > WIDTH:
            x, y = 8.0, y + 16
        drawn.append(tag("g", key, transform=f"translate({x + 6:.1f} {y - 4:.1f})") + words_at(x + 18, y, shown))
        x += wide
    return "".join(drawn), y + 10


def spread(values: Sequence[float], gap: float, high: float) -> list[float]:
    """Return places, close to the falling `values`, that are at least `gap` apart and at most `high`."""
    places = list(values)
    for _ in range(200):  # neighbours that are too close push each other apart, until none is
        for i in range(len(places) - 1):
            lack = gap - (places[i] - places[i + 1])
            if lack > 0:
                places[i] += lack / 2
                places[i + 1] -= lack / 2
        places = [min(place, high - i * gap) for i, place in enumerate(places)]
    return places


def short(value: float) -> str:
    """Return a number for an axis or a table: 0.125, 1.5k, 3M."""
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= size:
            return f"{value / (1e3 if unit == 'k' else size):.4g}{unit}"
    return f"{value:.4g}"
