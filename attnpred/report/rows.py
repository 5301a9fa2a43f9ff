"""Reading the rows of `attnpred eval`, and checking them: what the report draws comes from `Row` and nothing else.

A row is one JSON object on one line. Needed are the keys of `NEEDED`; the others may be missing or null, and what needs
them is then left out. A wrong value is an error that names file and line. `raw` keeps the whole object for the table.
"""

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from attnpred.checks import is_finite
from attnpred.errors import ConfigError
from attnpred.reading import ROWS_BYTES, parse_json, read_text
from attnpred.row_check import require_unchanged

Raw = dict[str, Any]
COSTS = ("ms_per_token", "bytes_per_step", "fast_bytes")
"""What a row may cost: milliseconds, bytes read in a decode step, bytes held in fast memory."""


@dataclass(frozen=True, slots=True)
class Against:
    """How a row differs from the full cache, item by item: the mean difference (row - full) and its 95 % interval."""

    difference: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Item:
    """One measured thing of a row; labels say what it may be sorted by (depth, turn ...)."""

    value: float
    labels: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Row:
    """One line. budget: a share of the context up to 1, else tokens; None only of the policy `full`. length: tokens.

    text: which texts, "" where the row does not say. value: NaN where nothing was measured (n = 0). interval: of `value`,
    95 %. costs: those of `COSTS` that are known.
    """

    model: str
    policy: str
    budget: float | None
    task: str
    text: str
    metric: str
    length: int | None
    value: float
    n: int | None
    interval: tuple[float, float] | None
    against: Against | None
    lower_is_better: bool
    costs: Mapping[str, float]
    items: tuple[Item, ...]
    raw: Raw

    @property
    def is_full(self) -> bool:
        """Whether this is the full cache, to which the others are compared."""
        return self.policy.partition(":")[0] == "full"

    @property
    def is_empty(self) -> bool:
        """Whether nothing was measured."""
        return math.isnan(self.value)

    @property
    def share(self) -> float | None:
        """The budget as a share of the context, where that is known; 1 for the full cache."""
        if self.is_full:
            return 1.0
        if self.budget is None or self.budget <= 1:
            return self.budget
        return self.budget / self.length if self.length else None


def read_rows(paths: Sequence[Path], say: Callable[[str], None] = print) -> list[Row]:
    """Return the rows of all files, in order; a line that was there before, word for word, counts once.

    A last line without an end is what a killed `attnpred eval` leaves: it is left out, and told to `say`.
    Raises `ConfigError`: a file cannot be read, a line is no row, or there are none.
    """
    found: dict[str, Row] = {}
    for path in paths:
        *lines, rest = read_text(path, "a file of rows that `attnpred eval` wrote", ROWS_BYTES).split("\n")
        if _is_json(rest):
            lines.append(rest)
        elif rest.strip():
            say(f"{path} line {len(lines) + 1} has no end and is left out")
        for number, line in enumerate(lines, start=1):
            if line.strip():
                found[line] = _row(line, f"{path} line {number}")
    if not found:
        raise ConfigError(
            f"got no rows in {', '.join(map(str, paths))}, expected at least one: write some with `attnpred eval`"
        )
    return list(found.values())


def _is_json(line: str) -> bool:
    try:
        parse_json(line, "", "")
    except ConfigError:
        return False
    return True


def _row(line: str, where: str) -> Row:
    raw = parse_json(line, where, "one object: run `attnpred eval` again if it was cut short")
    if not isinstance(raw, dict):
        raise ConfigError(f"got {where} with {_short(raw)}, expected an object with {_names(NEEDED)}")
    require_unchanged(raw, where)
    for name, (check, _) in NEEDED.items():
        if name not in raw:
            raise ConfigError(f"got {where} without {name!r}, expected {_names(NEEDED)}")
        nothing = name == "value" and raw[name] is None and raw.get("n") == 0
        if not nothing and (raw[name] is None or not check(raw[name])):
            raise _wrong(where, name, raw[name])
    for name, (check, _) in OPTIONAL.items():
        if raw.get(name) is not None and not check(raw[name]):
            raise _wrong(where, name, raw[name])
    budget = raw.get("budget")
    if budget is None and raw["policy"].partition(":")[0] != "full":
        raise ConfigError(
            f"got {where} without 'budget', expected one for policy {raw['policy']!r} (only full has none)"
        )
    return Row(
        model=raw["model"],
        policy=raw["policy"],
        budget=budget,
        task=raw["task"],
        text=raw.get("text") or "",
        metric=raw["metric"],
        length=raw.get("length"),
        value=math.nan if raw["value"] is None else raw["value"],
        n=raw.get("n"),
        interval=(raw["interval"][0], raw["interval"][1]) if raw.get("interval") else None,
        against=_against(raw.get("against_full")),
        lower_is_better=bool(raw.get("lower_is_better")),
        costs={name: raw[name] for name in COSTS if raw.get(name) is not None},
        items=tuple(_items(raw.get("items") or (), where)),
        raw=raw,
    )


def _against(found: Mapping[str, Any] | None) -> Against | None:
    return Against(found["difference"], *found["interval"]) if found and found.get("interval") else None


def _items(found: Sequence[Any], where: str) -> Iterator[Item]:
    for number, item in enumerate(found):
        labels = item.get("labels") or {} if isinstance(item, dict) else None
        if not isinstance(labels, dict) or not is_finite(item.get("value")):
            raise ConfigError(
                f"got {where} with items[{number}] = {_short(item)}, expected an object with a number 'value'"
            )
        yield Item(item["value"], labels)


def _wrong(where: str, name: str, value: Any) -> ConfigError:
    return ConfigError(f"got {where} with {name}={_short(value)}, expected {(NEEDED | OPTIONAL)[name][1]}")


def _short(value: Any) -> str:
    words = json.dumps(value)
    return words if len(words) <= 60 else words[:57] + "..."


def _names(table: Mapping[str, Any]) -> str:
    return "the keys " + ", ".join(table)


def _word(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _interval(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(map(is_finite, value)) and value[0] <= value[1]


def _paired(value: Any) -> bool:
    if not isinstance(value, dict):
        return False
    both = value.get("difference"), value.get("interval")
    return both == (None, None) or (is_finite(both[0]) and _interval(both[1]))


Check = tuple[Callable[[Any], bool], str]
_A_WORD = (_word, "a text")
_A_COST = (lambda value: is_finite(value) and value >= 0, "a number of at least 0")
_AN_INTERVAL = (_interval, "two numbers, the lower one first")
NEEDED: dict[str, Check] = {
    "model": _A_WORD,
    "policy": _A_WORD,
    "task": _A_WORD,
    "metric": _A_WORD,
    "value": (is_finite, "a finite number (null only where n is 0)"),
}
OPTIONAL: dict[str, Check] = {
    "budget": (lambda value: is_finite(value) and value > 0, "a share up to 1 or a number of tokens"),
    "length": (lambda value: _count(value) and value > 0, "a whole number of tokens"),
    "n": (_count, "a whole number"),
    "text": _A_WORD,
    "interval": _AN_INTERVAL,
    "against_full": (_paired, "'difference' and its 'interval': the report shows none without the other"),
    "items": (lambda value: isinstance(value, list), "a list"),
    "config": (lambda value: isinstance(value, dict), "an object"),
    "settings": (lambda value: isinstance(value, dict), "an object"),
    "lower_is_better": (lambda value: isinstance(value, bool), "true or false"),
    **dict.fromkeys(COSTS, _A_COST),
}
