"""The file of rows: one JSON object per line, appended cell by cell, by several processes at once, read on a restart.

The rows of a cell are written in one piece, forced to the disk, under a lock (`flock`) on the file itself. `part` and
`parts` of a row say which row of its cell it is. Whatever ends a process in the middle of a write leaves a torn tail: a
line without its end, or a cell without its last row. It is cut off when the file is opened again, and that cell is done
anew. A file with anything else in it is refused, and left as it is.
"""

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, final

from attnpred.errors import ConfigError

try:
    import fcntl
except ImportError:  # Windows: one process at a time
    fcntl = None  # type: ignore[assignment]

Row = dict[str, Any]
KEY = ("model", "policy", "budget", "task", "length", "seed", "settings")
"""What names a cell: a row with the same is not measured again."""
BEGINNING = b'{"model": '
NEEDED = (*KEY, "metric", "value", "n", "part", "parts")


def key_of(row: Row) -> str:
    """Return the cell of a row as text."""
    return json.dumps([row[name] for name in KEY], sort_keys=True)


@final
class RowsFile:
    """The file; `open` it before the first row, and from every process that appends to it."""

    def __init__(self, path: Path) -> None:
        if not path.parent.is_dir():
            raise ConfigError(f"got {path}, expected a file in a folder that exists")
        self.path = path

    def open(self) -> list[Row]:
        """Cut a torn tail off, and return all rows. Raises `ConfigError` if the file holds something else."""
        if not self.path.exists():
            return []
        with self._locked() as file:
            return _whole(file, self.path)

    def append(self, rows: Sequence[Row]) -> None:
        """Write the rows of one cell, whole, after what is whole."""
        lines = [json.dumps(row | {"part": i, "parts": len(rows)}) + "\n" for i, row in enumerate(rows)]
        with self._locked() as file:
            _whole(file, self.path)  # another process may have been killed in the middle of its write
            file.write("".join(lines).encode())
            file.flush()
            os.fsync(file.fileno())

    @contextmanager
    def _locked(self) -> Iterator[BinaryIO]:
        try:
            with self.path.open("ab+") as file:
                if fcntl is not None:
                    fcntl.flock(file, fcntl.LOCK_EX)  # given back when the file is closed
                yield file
        except OSError as error:
            raise ConfigError(f"got {self.path}, expected a file to write rows to: {error.strerror}") from None


def _whole(file: BinaryIO, path: Path) -> list[Row]:
    """Return the rows of all whole cells, and leave nothing else in the file."""
    file.seek(0)
    data = file.read()
    rows, size = _read(data, path)
    if size < len(data):
        file.truncate(size)
    return rows


def load_rows(path: Path) -> list[Row]:
    """Return the whole rows of a file, and leave it alone. Raises `ConfigError`."""
    try:
        return _read(path.read_bytes(), path)[0]
    except OSError as error:
        raise ConfigError(f"got {path}, expected a file of attnpred eval: {error.strerror}") from None


def _read(data: bytes, path: Path) -> tuple[list[Row], int]:
    """Return the rows of all whole cells, and the size of what they take."""
    rows: list[Row] = []
    ends: list[int] = []
    place = 0
    lines = data.split(b"\n")
    for number, line in enumerate(lines[:-1], 1):
        place += len(line) + 1
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if not isinstance(row, dict) or not set(NEEDED) <= set(row):
            raise ConfigError(f"got {path} whose line {number} is no row of attnpred eval, expected another --out file")
        rows.append(row)
        ends.append(place)
    if not rows and lines[-1][: len(BEGINNING)] != BEGINNING[: len(lines[-1])]:
        raise ConfigError(f"got {path} whose line 1 is no row of attnpred eval, expected another --out file")
    while rows and rows[-1]["part"] + 1 < rows[-1]["parts"]:
        rows.pop()
        ends.pop()
    return rows, ends[-1] if ends else 0
