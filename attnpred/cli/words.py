"""Lists on the command line, and the text files it names."""

import math
import re
from collections.abc import Sequence
from pathlib import Path

from attnpred.errors import ConfigError


def words(text: str) -> list[str]:
    """Split a list of policies or texts; a comma inside settings (`name:a=1,b=2`) does not end a word."""
    parts: list[str] = []
    for part in re.split(r"[,\s]+", text.strip()):
        if "=" in part and ":" not in part and parts:
            parts[-1] += "," + part
        elif part:
            parts.append(part)
    return parts


def floats(name: str, text: str) -> list[float]:
    """Split a list of numbers."""
    try:
        found = [float(part) for part in re.split(r"[,\s]+", text.strip())]
        if not all(map(math.isfinite, found)):
            raise ValueError
        return found
    except ValueError:
        raise ConfigError(f"got {name} {text!r}, expected numbers with commas between them") from None


def text_files(given: Sequence[Path]) -> list[Path]:
    """Return the files that `given` names: text files, and folders of .txt files. Raises `ConfigError`."""
    files = [file for path in given for file in (sorted(path.glob("*.txt")) if path.is_dir() else [path])]
    missing = [file for file in files if not file.is_file()]
    if missing or not files:
        raise ConfigError(f"got {[*missing, *given][0]}, expected a text file or a folder of .txt files")
    return files
