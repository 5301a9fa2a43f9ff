"""The file of rows: one JSON object per line, appended cell by cell by one run, read on a restart.

A run claims the file before it measures anything: it makes sure that it can write there, and locks it (`flock`) for as long
as it lives, so that a second run is refused rather than measures everything again. The rows of a cell are written in one
piece and forced to the disk; where that fails (a full disk), they wait in memory and are tried again with the next cell's.
`part` and `parts` of a row say which row of its cell it is. Whatever ends a process in the middle of a write leaves a torn
tail: the beginning of a row, or a cell without its last row. It is cut off when the file is claimed again, and that cell is
done anew. A file with anything else in it, or with a row that was changed (`attnpred.row_check`), is refused, and left as it
is.
"""

import json
import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, final

from attnpred.errors import AttnpredError, ConfigError
from attnpred.files import put, target
from attnpred.reading import ROWS_BYTES, parse_json, read_bytes
from attnpred.row_check import require_unchanged, with_check

try:
    import fcntl
except ImportError:  # Windows: nothing keeps a second run away
    fcntl = None  # type: ignore[assignment]

Row = dict[str, Any]
KEY = ("model", "policy", "budget", "task", "length", "seed", "settings", "inputs")
"""What names a cell: a row with the same is not measured again."""
BEGINNING = b'{"model": '
NEEDED = (*KEY[:-1], "metric", "value", "n", "part", "parts")


def key_of(row: Row) -> str:
    """Return the cell of a row as text. A row that names no inputs, as none did at first, is of no cell of a plan."""
    return json.dumps([row.get(name) for name in KEY], sort_keys=True)


@final
class RowsFile:
    """The file. rows: all that are there or wait to be; problem: why the last attempt to write failed, or None."""

    def __init__(self, path: Path) -> None:
        if not path.parent.is_dir():
            raise ConfigError(f"got {path}, expected a file in a folder that exists")
        self.path = path
        self.rows: list[Row] = []
        self.problem: str | None = None
        self._waiting: list[bytes] = []
        self._fd = -1

    @contextmanager
    def claimed(self) -> Iterator["RowsFile"]:
        """Hold the file for this run, made if missing, without a torn tail. Raises `ConfigError` if it cannot be had.

        What could not be written stays in `waiting()` after the block. A file in which nothing was written is removed again.
        """
        is_new = not self.path.exists()
        self._open()
        try:
            self.rows, size, whole = _read(read_bytes(self.path, "rows of attnpred eval", ROWS_BYTES), self.path)
            with self._telling():
                os.ftruncate(self._fd, size)
                put(self._fd, b"" if whole else b"\n")
                self._try_out()
            yield self
            self._write_waiting()
        finally:
            if is_new and self._is_ours() and os.fstat(self._fd).st_size == 0:
                self.path.unlink()
            self._close()  # and with it goes the lock

    def append(self, rows: Sequence[Row]) -> None:
        """Write the rows of one cell, whole, and what still waits before them; see `problem`."""
        made = [with_check(row | {"part": i, "parts": len(rows)}) for i, row in enumerate(rows)]
        self._waiting.append("".join(json.dumps(row, allow_nan=False) + "\n" for row in made).encode())
        self.rows += made
        self._write_waiting()

    def waiting(self) -> str:
        """Return the lines that could not be written."""
        return b"".join(self._waiting).decode()

    def of_cell(self, key: str) -> list[Row]:
        """Return the rows of the cell that `key_of` names so."""
        return [row for row in self.rows if key_of(row) == key]

    def _open(self) -> None:
        with self._telling():
            self._fd = os.open(target(self.path), os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o666)
            if fcntl is not None:
                try:
                    fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    self._close()
                    raise ConfigError(
                        f"got {self.path}, to which another attnpred eval is writing, expected one run at a time: wait for it, "
                        "or give another --out"
                    ) from None
                except OSError:
                    pass  # a file system without locks

    def _close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
        self._fd = -1

    @contextmanager
    def _telling(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise ConfigError(f"got {self.path}, expected a file to write rows to: {error.strerror}") from None

    def _try_out(self) -> None:
        """Write the beginning of a row, which a run that is killed here may leave behind, and take it back."""
        size = os.fstat(self._fd).st_size
        put(self._fd, BEGINNING)
        os.fsync(self._fd)
        os.ftruncate(self._fd, size)

    def _is_ours(self) -> bool:
        """Return whether the name still belongs to the file that was claimed."""
        with suppress(OSError):
            return self._fd >= 0 and os.path.samestat(os.fstat(self._fd), self.path.stat())
        return False

    def _write_waiting(self) -> None:
        try:
            if not self._is_ours():  # it was moved away or deleted: what comes next goes where the name says
                self._close()
                self._open()
            size = os.fstat(self._fd).st_size
            try:
                put(self._fd, b"".join(self._waiting))
                os.fsync(self._fd)
            except OSError:
                with suppress(OSError):
                    os.ftruncate(self._fd, size)
                raise
        except (OSError, AttnpredError) as error:
            self.problem = getattr(error, "strerror", None) or str(error)
        else:
            self.problem = None
            self._waiting.clear()


def as_json(value: Any) -> Any:
    """Return `value` as JSON can hold it: null for a number that is not finite."""
    if isinstance(value, dict):
        return {name: as_json(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [as_json(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def load_rows(path: Path) -> list[Row]:
    """Return the whole rows of a file, and leave it alone. Raises `ConfigError`."""
    return _read(read_bytes(path, "a file of attnpred eval", ROWS_BYTES), path)[0]


def _read(data: bytes, path: Path) -> tuple[list[Row], int, bool]:
    """Return the rows of all whole cells, the size of what they take, and whether the last of them has its line end."""
    rows: list[Row] = []
    ends: list[int] = []
    place = 0
    *lines, rest = data.split(b"\n")
    for number, line in enumerate(lines, 1):
        place += len(line) + 1
        rows.append(_row(line, path, number))
        ends.append(place)
    if rest:
        try:
            rows.append(_row(rest, path, len(lines) + 1))
            ends.append(place + len(rest))
        except ConfigError:
            if rest[: len(BEGINNING)] != BEGINNING[: len(rest)]:
                raise
    while rows and rows[-1]["part"] + 1 < rows[-1]["parts"]:
        rows.pop()
        ends.pop()
    size = ends[-1] if ends else 0
    return rows, size, size <= place


def _row(line: bytes, path: Path, number: int) -> Row:
    refused = ConfigError(f"got {path} whose line {number} is no row of attnpred eval, expected another --out file")
    try:
        row = parse_json(line.decode(), f"{path} line {number}", "a row")
    except (UnicodeDecodeError, ConfigError):
        raise refused from None
    if not isinstance(row, dict) or not set(NEEDED) <= set(row):
        raise refused
    items = row.get("items", [])
    are_items = isinstance(items, list) and all(
        isinstance(item, dict) and {"name", "value"} <= set(item) for item in items
    )
    counts = row["part"], row["parts"]
    if not are_items or any(type(count) is not int for count in counts) or not 0 <= counts[0] < counts[1]:
        raise refused
    require_unchanged(row, f"{path} line {number}")
    return row
