"""Writing a figure of matplotlib as every other file: whole or not at all, and over nothing but a file."""

import io
from pathlib import Path
from typing import Any

from attnpred.errors import ConfigError
from attnpred.files import write_bytes


def save_figure(figure: Any, path: Path, dpi: int) -> None:
    """Write `figure` in the format that the name asks for, PNG without one. Raises `ConfigError`, `OutputError`."""
    data = io.BytesIO()
    try:
        figure.savefig(data, format=path.suffix[1:] or "png", dpi=dpi)
    except ValueError as error:  # matplotlib knows no such format
        raise ConfigError(f"got {path}, expected a name that ends in .png, .svg or .pdf: {error}") from None
    write_bytes(path, data.getvalue())
