"""Lines of JSON as the tasks read them: every value is asked for by name and type, and an error names the place.

A name that begins with `hf:` is fetched from the Hub instead (`attnpred.evaluation.tasks.hub`).
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from attnpred.errors import ConfigError
from attnpred.evaluation.tasks.base import Example, Wanted, require_file
from attnpred.evaluation.tasks.hub import hub_rows, is_hub_name
from attnpred.reading import parse_json, read_text


@dataclass(frozen=True, slots=True)
class Row:
    """One object; place: where it stands, for messages."""

    place: str
    values: dict[str, Any]

    def text(self, field: str, default: str | None = None) -> str:
        """Return a text. Raises `ConfigError`, unless the field is missing and there is a default."""
        value = self.values.get(field, default)
        if not isinstance(value, str):
            raise self._error(field, "a text")
        return value

    def texts(self, field: str) -> tuple[str, ...]:
        """Return a list of texts, at least one; numbers become texts. Raises `ConfigError`."""
        value = self.values.get(field)
        if not isinstance(value, list) or not value or not all(isinstance(part, str | int | float) for part in value):
            raise self._error(field, "a list of texts, at least one")
        return tuple(map(str, value))

    def answer(self, field: str) -> str:
        """Return a text or a number as text. Raises `ConfigError`."""
        value = self.values.get(field)
        if isinstance(value, bool) or not isinstance(value, str | int | float):
            raise self._error(field, "a text or a number")
        return str(value)

    def _error(self, field: str, kind: str) -> ConfigError:
        got = f"{field}={json.dumps(self.values[field])[:40]}" if field in self.values else ", ".join(self.values)
        return ConfigError(f"got {got or 'an empty object'} in {self.place}, expected field {field!r} with {kind}")


def read_rows(wanted: Wanted, task: str) -> list[Row]:
    """Return all objects of the task's file. Raises `ConfigError` for a line that is none, and for a file without any."""
    if wanted.file is not None and is_hub_name(str(wanted.file)):
        name = str(wanted.file)
        return [Row(f"row {i} of {name}", values) for i, values in enumerate(hub_rows(name), 1)]
    path = require_file(wanted, task)
    rows = [
        _parse(line, f"line {i} of {path}") for i, line in enumerate(read_text(path).split("\n"), 1) if line.strip()
    ]
    if not rows:
        raise ConfigError(f"got {path} without a line, expected one JSON object per line")
    return rows


def _parse(line: str, place: str) -> Row:
    values = parse_json(line, place, "one JSON object per line")
    if not isinstance(values, dict):
        raise ConfigError(f"got {line.strip()[:40]!r} in {place}, expected a JSON object")
    return Row(place, values)


def refuse_none(fitting: Sequence[Example], sizes: Sequence[int], wanted: Wanted, task: str) -> None:
    """Raise `ConfigError` if no example fits into `wanted.length`; `sizes` are those of all, in tokens."""
    if not fitting:
        raise ConfigError(
            f"got length {wanted.length} for task {task!r}, expected at least {min(sizes)}, "
            f"the tokens of the shortest of {len(sizes)} examples in {wanted.file}"
        )
