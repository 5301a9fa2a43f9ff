"""The check value of a row of results: a row that a disk or an editor changed is refused, and never drawn or compared.

It is a CRC of the row's values, whatever the order of its keys and the spaces between them. A row without one is read as it
is: one that was made by hand, or of another program.
"""

import json
import zlib
from typing import Any

from attnpred.errors import ConfigError

CHECK = "check"


def check_value(row: dict[str, Any]) -> int:
    """Return the check value of a row as it is read from JSON, whatever `CHECK` is in it."""
    values = {name: value for name, value in row.items() if name != CHECK}
    return zlib.crc32(json.dumps(values, sort_keys=True).encode())


def with_check(row: dict[str, Any]) -> dict[str, Any]:
    """Return a row that is to be written, with its check value at the end."""
    return row | {CHECK: check_value(json.loads(json.dumps(row)))}


def require_unchanged(row: dict[str, Any], where: str) -> None:
    """Raise `ConfigError` if a row that was read from `where` has a check value, and not its own."""
    if CHECK in row and row[CHECK] != check_value(row):
        raise ConfigError(
            f"got {where} with values that were changed after it was measured, expected them as `attnpred eval` wrote "
            "them: remove that line, and measure it again"
        )
