"""The few parts of which charts are made: escaped elements, a scale with round ticks, markers, a picture with its words.

Colours are classes (`c0`, `quiet` ...), so that a page in the dark needs no other picture; `standalone` adds the rules
for paper. Sizes are in the units of the picture, which is `WIDTH` wide and so is read on a phone without zooming.
"""

import html
import math
from collections.abc import Mapping
from dataclasses import dataclass

from attnpred.report.look import COLOURS, LIGHT

WIDTH = 380


@dataclass(frozen=True, slots=True)
class Picture:
    """A finished picture. name: for ids and file names; title and words: what a screen reader says; svg: the element."""

    name: str
    title: str
    words: str
    svg: str


def tag(name: str, content: str = "", **attributes: object) -> str:
    """Return an element. `content` is markup; attributes are escaped, `_` at the end dropped, other `_` become `-`."""
    own = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{html.escape(_number(value))}"' for key, value in attributes.items()
    )
    return f"<{name}{own}>{content}</{name}>" if content else f"<{name}{own}/>"


def words_at(x: float, y: float, words: str, **attributes: object) -> str:
    """Return a text at a place; the words are escaped."""
    return tag("text", html.escape(words), x=x, y=y, **attributes)


def picture(name: str, title: str, words: str, height: float, body: str) -> Picture:
    """Return an SVG element of `WIDTH` x `height` with a title and a description; `name` is unique on the page."""
    head = tag("title", html.escape(title), id=f"{name}-title") + tag("desc", html.escape(words), id=f"{name}-words")
    svg = tag(
        "svg",
        head + body,
        xmlns="http://www.w3.org/2000/svg",
        viewBox=f"0 0 {WIDTH} {height:.0f}",
        class_="chart",
        role="img",
        aria_labelledby=f"{name}-title {name}-words",
    )
    return Picture(name, title, words, svg)


def standalone(made: Picture) -> str:
    """Return the picture as a file of its own, in colours for paper."""
    rules = RULES.replace("var(--page)", LIGHT["page"]) + colours(LIGHT)
    head, end, body = made.svg.partition(">")
    return f'<?xml version="1.0" encoding="UTF-8"?>\n{head}{end}{tag("style", rules)}{body}\n'


CLASSES = ("ink", "quiet", "line", *(f"c{i}" for i in range(COLOURS)))
RULES = (  # currentColor and classes are what every program that reads SVG understands; variables are not
    ".chart text{font:11px system-ui,sans-serif;fill:currentColor;stroke:none}"
    ".chart path,.chart line{fill:none;stroke:currentColor;stroke-width:1.5}"
    ".chart .thin{stroke-width:1}.chart .faint{stroke-opacity:.6}.chart .wide{stroke-width:2.4}.chart .dashed{stroke-dasharray:5 3}"
    ".chart .solid{fill:currentColor}.chart .ring{fill:none;stroke:currentColor;stroke-width:1.5}"
    ".chart .middle{text-anchor:middle}.chart .end{text-anchor:end}.chart .bold{font-weight:700}"
    ".chart text.halo{paint-order:stroke;stroke:var(--page);stroke-width:3px}"
)


def colours(palette: Mapping[str, str]) -> str:
    """Return a rule for the colour of each class of `CLASSES`; what has no class is in ink."""
    return f".chart{{color:{palette['ink']}}}" + "".join(f".chart .{name}{{color:{palette[name]}}}" for name in CLASSES)


def mark(shape: str, x: float, y: float, note: str = "", size: float = 4.0) -> str:
    """Return a marker of `look.MARKERS` around a point; `note` shows when the mouse rests on it."""
    s = size
    paths = {
        "circle": f"M{-s} 0a{s} {s} 0 1 0 {2 * s} 0a{s} {s} 0 1 0 {-2 * s} 0z",
        "square": f"M{-s * 0.9} {-s * 0.9}h{s * 1.8}v{s * 1.8}h{-s * 1.8}z",
        "up": f"M0 {-s * 1.2}L{s * 1.1} {s * 0.9}H{-s * 1.1}z",
        "down": f"M0 {s * 1.2}L{s * 1.1} {-s * 0.9}H{-s * 1.1}z",
        "diamond": f"M0 {-s * 1.3}L{s * 1.1} 0L0 {s * 1.3}L{-s * 1.1} 0z",
        "cross": f"M{-s} {-s}L{s} {s}M{-s} {s}L{s} {-s}",
        "plus": f"M0 {-s * 1.2}V{s * 1.2}M{-s * 1.2} 0H{s * 1.2}",
        "bar": f"M{-s * 1.2} {-s * 0.45}h{s * 2.4}v{s * 0.9}h{-s * 2.4}z",
    }
    inside = tag("title", html.escape(note)) if note else ""
    open_shape = shape in ("cross", "plus")
    return tag("path", inside, d=paths[shape], transform=f"translate({x:.1f} {y:.1f})", class_="wide" if open_shape else "solid")  # fmt: skip


@dataclass(frozen=True, slots=True)
class Scale:
    """Values from `low` to `high` onto the picture from `start` to `end`, evenly or (`log`) by their logarithm."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        """Return the place of a value."""
        a, b, v = (math.log(x) if self.log else x for x in (self.low, self.high, value))
        return self.start + (self.end - self.start) * ((v - a) / (b - a) if b > a else 0.5)

    def ticks(self, most: int = 6) -> list[float]:
        """Return round values inside, `most` or fewer."""
        if self.log and self.high > 8 * self.low:
            powers = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
            found = [self.low, self.high]
            for steps in ((1, 2, 5), (1, 3), (1,)):
                fine = [step * 10.0**power for power in powers for step in steps]
                found = [value for value in fine if self.low * 0.999 <= value <= self.high * 1.001]
                if len(found) <= most:
                    return found
            return found[:: -(-len(found) // most)]
        span = self.high - self.low
        if span <= 0:
            return [self.low]
        raw = span / most
        size = 10.0 ** math.floor(math.log10(raw))
        step = next(size * k for k in (1, 2, 5, 10) if size * k >= raw * 0.999)
        first = math.ceil(self.low / step - 1e-9)
        return [round(i * step, 12) for i in range(first, math.floor(self.high / step + 1e-9) + 1)]


def around(values: list[float], start: float, end: float, log: bool = False, margin: float = 0.06) -> Scale:
    """Return a scale that holds all `values` with a margin on both sides."""
    low, high = min(values), max(values)
    if log:
        room = max(high / low, 1.05) ** margin
        return Scale(low / room, high * room, start, end, True)
    room = (high - low) * margin or abs(high) * margin or margin
    return Scale(low - room, high + room, start, end)


def _number(value: object) -> str:
    return f"{value:.1f}".removesuffix(".0") if isinstance(value, float) else str(value)
