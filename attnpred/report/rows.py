"""Reading the rows of `attnpred eval`, and checking them: what the report draws comes from `Row` and nothing else.

A row is one JSON object on one line. Its names and types are the fields of `Row`; those with a default may be missing or
null, and what needs them is then left out. A wrong value is an error that names file and line. `raw` keeps the whole
object for the table.
"""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, FiniteFloat, Strict, ValidationError

from attnpred.errors import ConfigError
from attnpred.reading import ROWS_BYTES, parse_json, read_text
from attnpred.row_check import require_unchanged

Raw = dict[str, Any]
COSTS = ("ms_per_token", "bytes_per_step", "fast_bytes")
"""What a row may cost: milliseconds, bytes read in a decode step, bytes held in fast memory."""


def _ordered(value: tuple[float, float]) -> tuple[float, float]:
    if value[0] > value[1]:
        raise ValueError("turned round")
    return value


Words = Annotated[str, Field(pattern=r"\S", description="a text")]
Interval = Annotated[tuple[FiniteFloat, FiniteFloat], Strict(False), AfterValidator(_ordered)]  # JSON has lists
Cost = Annotated[FiniteFloat, Field(ge=0)]


class _Part(BaseModel):
    """A part of a JSON object: types as they are written, other keys allowed."""

    model_config = ConfigDict(frozen=True, strict=True)


class Against(_Part):
    """How a row differs from the full cache, item by item: the mean difference (row - full) and its 95 % interval."""

    difference: FiniteFloat
    interval: Interval

    @property
    def low(self) -> float:
        """The lower end of the interval."""
        return self.interval[0]

    @property
    def high(self) -> float:
        """The upper end of the interval."""
        return self.interval[1]


class Item(_Part):
    """One measured thing of a row; labels say what it may be sorted by (depth, turn ...)."""

    value: FiniteFloat
    labels: Annotated[dict[str, Any], BeforeValidator(lambda labels: labels or {})] = {}


class Row(_Part):
    """One line. budget: a share of the context up to 1, else tokens; None only of the policy `full`. length: tokens.

    text: which texts, "" where the row does not say. value: NaN where nothing was measured (n = 0). interval: of `value`,
    95 %.
    """

    model: Words
    policy: Words
    task: Words
    metric: Words
    value: float = Field(description="a finite number (null only where n is 0)")
    budget: FiniteFloat | None = Field(None, gt=0, description="a share up to 1 or a number of tokens")
    length: int | None = Field(None, gt=0, description="a whole number of tokens")
    n: int | None = Field(None, ge=0, description="a whole number")
    text: Words = ""
    interval: Interval | None = Field(None, description="two numbers, the lower one first")
    against: Against | None = Field(
        None,
        alias="against_full",
        description="'difference' and its 'interval': the report shows none without the other",
    )
    items: list[Item] = Field([], description="a list")
    config: dict[str, Any] = Field({}, description="an object")
    settings: dict[str, Any] = Field({}, description="an object")
    lower_is_better: bool = Field(False, description="true or false")
    ms_per_token: Cost | None = Field(None, description="a number of at least 0")
    bytes_per_step: Cost | None = Field(None, description="a number of at least 0")
    fast_bytes: Cost | None = Field(None, description="a number of at least 0")
    raw: Raw

    @property
    def costs(self) -> Mapping[str, float]:
        """Those of `COSTS` that are known."""
        found = {name: getattr(self, name) for name in COSTS}
        return {name: value for name, value in found.items() if value is not None}

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
        raise ConfigError(f"got {where} with {_short(raw)}, expected an object with {_NEEDED}")
    require_unchanged(raw, where)
    given = {name: value for name, value in raw.items() if value is not None or name in NEEDED}
    if given.get("value", 0) is None and raw.get("n") == 0:
        given["value"] = math.nan
    against = given.get("against_full")
    if isinstance(against, dict) and against.get("difference") is None and against.get("interval") is None:
        del given["against_full"]
    try:
        row = Row.model_validate(given | {"raw": raw})
    except ValidationError as error:
        raise _wrong(where, raw, error) from None
    if row.budget is None and not row.is_full:
        raise ConfigError(f"got {where} without 'budget', expected one for policy {row.policy!r} (only full has none)")
    return row


def _wrong(where: str, raw: Raw, error: ValidationError) -> ConfigError:
    """Return the error for the first wrong value."""
    name, *rest = error.errors(include_url=False)[0]["loc"]
    if name not in raw:
        return ConfigError(f"got {where} without {name!r}, expected {_NEEDED}")
    if name == "items" and rest:
        item = _short(raw["items"][rest[0]])
        return ConfigError(f"got {where} with items[{rest[0]}] = {item}, expected an object with a number 'value'")
    found = next(field for own, field in Row.model_fields.items() if name in (own, field.alias))
    return ConfigError(f"got {where} with {name}={_short(raw[str(name)])}, expected {found.description}")


def _short(value: Any) -> str:
    words = json.dumps(value)
    return words if len(words) <= 60 else words[:57] + "..."


NEEDED = [name for name, field in Row.model_fields.items() if field.is_required() and name != "raw"]
_NEEDED = "the keys " + ", ".join(NEEDED)
