"""Rows of a dataset of the Hub, by the package `datasets` (extra `eval`): `hf:OWNER/NAME`, `/CONFIG` and `@SPLIT` after it.

The split is `test` unless it is named. What is fetched is kept by `datasets` in its own cache folder. It no longer runs the
scripts that some old datasets come with; of those, give the downloaded file itself.
"""

from typing import Any

from attnpred.errors import ConfigError, missing_extra

PREFIX = "hf:"


def is_hub_name(name: str) -> bool:
    """Return whether `name` is that of a dataset, not of a file."""
    return name.startswith(PREFIX)


def hub_rows(name: str) -> list[dict[str, Any]]:
    """Return all rows of a dataset. Raises `MissingExtraError`, and `ConfigError` where it cannot be had."""
    path, _, split = name.removeprefix(PREFIX).partition("@")
    owner, _, rest = path.partition("/")
    dataset, _, config = rest.partition("/")
    if not owner or not dataset:
        raise ConfigError(f"got dataset {name!r}, expected hf:OWNER/NAME, hf:OWNER/NAME/CONFIG or hf:OWNER/NAME@SPLIT")
    try:
        from datasets import load_dataset
    except ImportError:
        raise missing_extra("datasets", "eval") from None
    try:
        found = load_dataset(f"{owner}/{dataset}", config or None, split=split or "test")
        rows = [dict(row) for row in found]
    except (
        Exception
    ) as error:  # no network, no such name, a format it does not know: it has an error of its own for each
        first = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise ConfigError(
            f"got dataset {name!r}, expected one that can be fetched from the Hub: {first}; or give a downloaded file"
        ) from None
    if not rows:
        raise ConfigError(f"got dataset {name!r} without a row, expected at least one")
    return rows
