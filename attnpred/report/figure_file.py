"""Writing a figure of matplotlib as every other file: whole or not at all, over nothing but a file, and tried out before."""

import io
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from attnpred.errors import ConfigError, missing_extra
from attnpred.files import try_out, write_bytes


def try_out_figure(path: Path, formats: Sequence[str]) -> None:
    """Raise `ConfigError`, `MissingExtraError` or `OutputError` unless a figure could be drawn and written to `path` now."""
    if path.suffix not in formats:
        raise ConfigError(f"got {path}, expected a name that ends in {' or '.join(formats)}")
    if find_spec("matplotlib") is None:
        raise missing_extra("matplotlib", "plot")
    try_out(path)


def save_figure(figure: Any, path: Path, dpi: int) -> None:
    """Write `figure` in the format that the name asks for, PNG without one. Raises `ConfigError`, `OutputError`."""
    data = io.BytesIO()
    try:
        figure.savefig(data, format=path.suffix[1:] or "png", dpi=dpi)
    except ValueError as error:  # matplotlib knows no such format
        raise ConfigError(f"got {path}, expected a name that ends in .png, .svg or .pdf: {error}") from None
    write_bytes(path, data.getvalue())
