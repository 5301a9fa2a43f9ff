"""What a table of the page holds. The page's template draws it in a box that scrolls by itself, its first column in view."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Cell:
    """words; note: a second, smaller line; is_best: told in bold and in a word; folded: text that can be unfolded."""

    words: str
    note: str = ""
    is_best: bool = False
    folded: str = ""


@dataclass(frozen=True, slots=True)
class Table:
    """name: its id on the page; rows: the first cell of each names the row; kind: "" or a class of the style."""

    name: str
    caption: str
    head: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    kind: str = ""


def table(name: str, caption: str, head: Sequence[str], rows: Sequence[Sequence[str | Cell]], kind: str = "") -> Table:
    """Return a table; a cell of words alone may be given as the words."""
    cells = tuple(tuple(Cell(cell) if isinstance(cell, str) else cell for cell in row) for row in rows)
    return Table(name, caption, tuple(head), cells, kind)
