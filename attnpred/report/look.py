"""How a series looks: colour, marker and letter, the same in every chart of a page; and the colours themselves.

Nothing is told by colour alone: each series has a marker and a letter as well, and the letter stands at its line.
The colours are dark (or, in the dark, light) enough to be seen on the page at a contrast of 3 and more, and far enough
apart for people with any of the three kinds of colour blindness (a test simulates them).
"""

from collections.abc import Iterable
from dataclasses import dataclass

LIGHT = {
    "ink": "#16191d", "quiet": "#545b64", "page": "#ffffff", "panel": "#f4f5f7", "line": "#c9ced6", "link": "#0a58a8",
    "c0": "#0067b1", "c1": "#8c3a00", "c2": "#1b1b1b", "c3": "#1b9e68", "c4": "#a25980", "c5": "#464646", "c6": "#ab9039",
}  # fmt: skip
DARK = {
    "ink": "#eceff3", "quiet": "#a9b1bc", "page": "#14171b", "panel": "#1e2329", "line": "#3d454f", "link": "#7db8f5",
    "c0": "#4fa8f0", "c1": "#d66c1d", "c2": "#ffffff", "c3": "#19f187", "c4": "#e88db6", "c5": "#656565", "c6": "#edd641",
}  # fmt: skip
COLOURS = 7
MARKERS = ("circle", "square", "up", "diamond", "down", "cross", "plus", "bar")  # 8 and 7: 56 pairs before one returns
SCALE = ((13, 27, 62), (38, 70, 120), (83, 98, 121), (129, 128, 116), (184, 168, 92), (246, 225, 98))
"""Colours of a heat map from low to high, blue to yellow: lightness grows all the way, so grey print keeps the order."""


@dataclass(frozen=True, slots=True)
class Look:
    """How one series looks: a colour of the page (`c0` ...), a marker, a letter."""

    colour: str
    marker: str
    letter: str


def looks(names: Iterable[str]) -> dict[str, Look]:
    """Return a look for every name, in order."""
    return {
        name: Look(f"c{i % COLOURS}", MARKERS[i % len(MARKERS)], _letter(i))
        for i, name in enumerate(dict.fromkeys(names))
    }


def _letter(number: int) -> str:
    turn, place = divmod(number, 26)
    return ("" if turn == 0 else _letter(turn - 1)) + chr(ord("A") + place)


def shade(share: float) -> tuple[int, int, int]:
    """Return the colour of `SCALE` at a share from 0 to 1."""
    place = min(max(share, 0.0), 1.0) * (len(SCALE) - 1)
    left = min(int(place), len(SCALE) - 2)
    red, green, blue = (round(a + (b - a) * (place - left)) for a, b in zip(SCALE[left], SCALE[left + 1], strict=True))
    return red, green, blue


def as_hex(colour: tuple[int, int, int]) -> str:
    """Return a colour as CSS writes it."""
    return "#{:02x}{:02x}{:02x}".format(*colour)


def contrast(a: str, b: str) -> float:
    """Return the contrast of two colours `#rrggbb`, 1 to 21 (WCAG 2.2, relative luminance)."""
    low, high = sorted((_luminance(a), _luminance(b)))
    return (high + 0.05) / (low + 0.05)


def ink_on(colour: str) -> str:
    """Return black or white, whichever is read better on `colour`."""
    return max("#000000", "#ffffff", key=lambda ink: contrast(ink, colour))


def _luminance(colour: str) -> float:
    parts = (int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5))
    red, green, blue = (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue
