"""Rows that may be compared: a place is one model, task, text, metric, length and set of documents (`inputs`).

In it a series is a policy's budgets.

Rows of one policy and budget that differ in a setting (block size, seed ...) are series of their own, named after what
differs, so that an ablation is drawn as one. Should two be alike even then, the last one is drawn; all are in the table.
"""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from attnpred.report.rows import Row

SETTINGS = (
    "seed",
    "granularity",
    "kind",
    "calibration",
    "block_size",
    "sink_tokens",
    "recent_tokens",
    "steps",
    "late_share",
)
"""Keys of a row that are settings, besides those of its `config`."""
BOUNDS = ("oracle",)
"""Policies that know the true attention: what is possible, so never the best."""


@dataclass(frozen=True, slots=True)
class Column:
    """A budget as it was given: a share up to 1, or tokens."""

    budget: float

    @property
    def words(self) -> str:
        """The budget in words."""
        return f"{100 * self.budget:.3g} %" if self.budget <= 1 else f"{self.budget:,.0f} tokens"


@dataclass(frozen=True, slots=True)
class Place:
    """Rows that may be compared. cells: (series, budget) to its row, without the full cache; series in order."""

    model: str
    task: str
    text: str
    metric: str
    length: int | None
    lower_is_better: bool
    full: Row | None
    cells: dict[tuple[str, Column], Row]
    hidden: int
    """Rows that are not drawn, because a later one is alike."""
    documents: str = ""
    """Which documents, where the same task was measured on several sets of them."""

    @property
    def name(self) -> str:
        """Name for headings: task, text, length, model, and which documents."""
        length = f"{self.length:,} tokens" if self.length else ""
        return ", ".join(
            filter(None, (self.task, self.text and f"text {self.text}", length, self.model, self.documents))
        )

    @property
    def series(self) -> list[str]:
        """Names of the series, in order of appearance."""
        return list(dict.fromkeys(name for name, _ in self.cells))

    @property
    def columns(self) -> list[Column]:
        """The budgets, largest first."""
        found = {column: row.share or 0.0 for (_, column), row in self.cells.items()}
        return sorted(found, key=lambda column: -found[column])

    def rivals(self, column: Column) -> list[tuple[str, Row]]:
        """Return what was measured at a budget, best first, without the bounds of `BOUNDS`."""
        found = [(name, row) for (name, at), row in self.cells.items() if at == column and not is_bound(row)]
        return sorted(found, key=lambda pair: pair[1].value if self.lower_is_better else -pair[1].value)


def is_bound(row: Row) -> bool:
    """Whether a row's policy knows the true attention."""
    return row.policy.partition(":")[0] in BOUNDS


def places(rows: Iterable[Row]) -> list[Place]:
    """Return the places of `rows`, tasks together, shorter texts first; rows without a value are left out."""
    groups: dict[tuple[str, str, str, str, int | None], dict[str, list[Row]]] = defaultdict(lambda: defaultdict(list))
    for row in (row for row in rows if not row.is_empty):
        groups[row.model, row.task, row.text, row.metric, row.length][str(row.raw.get("inputs") or "")].append(row)
    tasks = list(dict.fromkeys(key[1] for key in groups))
    order = sorted(groups, key=lambda key: (tasks.index(key[1]), key[0], key[3], key[2], key[4] or 0))
    return [
        _place(*key, f"documents {inputs or 'without a name'}" if len(groups[key]) > 1 else "", found)
        for key in order
        for inputs, found in groups[key].items()
    ]


def _place(
    model: str, task: str, text: str, metric: str, length: int | None, documents: str, rows: Sequence[Row]
) -> Place:
    full = [row for row in rows if row.is_full]
    parts = [row for row in rows if not row.is_full]
    names = _names(parts)
    cells = {(name, Column(row.budget or 1.0)): row for name, row in zip(names, parts, strict=True)}
    hidden = len(parts) - len(cells) + max(0, len(full) - 1)
    lower = any(row.lower_is_better for row in rows)
    return Place(model, task, text, metric, length, lower, full[-1] if full else None, cells, hidden, documents)


def _names(rows: Sequence[Row]) -> list[str]:
    """Return the name of each row's series: its policy, and the settings in which it differs from rows like it."""
    alike: dict[tuple[str, float | None], list[dict[str, str]]] = defaultdict(list)
    settings = [_settings(row) for row in rows]
    for row, own in zip(rows, settings, strict=True):
        alike[row.policy, row.budget].append(own)
    differ: dict[str, set[str]] = defaultdict(set)  # of a policy, the same keys at each of its budgets
    for (policy, _), group in alike.items():
        keys = {key for own in group for key in own}
        differ[policy] |= {key for key in keys if len({own.get(key) for own in group}) > 1}
    return [
        " ".join([row.policy, *(f"{key}={own[key]}" for key in sorted(differ[row.policy]) if key in own)])
        for row, own in zip(rows, settings, strict=True)
    ]


def _settings(row: Row) -> dict[str, str]:
    own = {key: row.raw[key] for key in SETTINGS if key in row.raw}
    own |= (row.raw.get("settings") or {}) | (row.raw.get("config") or {})
    return {key: str(value) for key, value in own.items()}
