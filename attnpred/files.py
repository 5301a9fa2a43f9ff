"""The one way to write a file: nobody ever reads half of it, nothing is left behind, and nothing but a file is replaced.

The bytes go to a temporary name in the same folder, are forced to the disk, and take their final name in one step. So what
a rename would destroy is refused before: a device, a pipe, a folder. A link is followed, and what it names is replaced.

A temporary file is locked (`flock`) as long as its writer lives, however that ends, and the next writer of the same name
removes those that are not. (The process id in the name is for people: in a container it is often the same one every time,
and two containers may share a folder.) What is written goes to the descriptor that is locked, never to the name: a library
that opens or replaces the name by itself would lose the lock.
"""

import os
import re
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from attnpred.errors import OutputError

try:
    import fcntl
except ImportError:  # Windows: nothing is locked, so nothing is removed
    fcntl = None  # type: ignore[assignment]

SHARED, PRIVATE = 0o666, 0o600
"""Modes of a new file: what the user's umask leaves of it, or for the user alone."""

_KINDS = (
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISFIFO, "a pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)
_KEPT = 50
"""Characters of a name that the temporary one begins with: with the rest no longer than any file system takes."""


def target(path: Path) -> Path:
    """Return the regular file that writing to `path` makes or replaces, links followed. Raises `OutputError`."""
    try:
        found = Path(os.path.realpath(path))
        mode = found.stat().st_mode if os.path.lexists(found) else None
    except (OSError, ValueError) as error:  # ValueError: a zero byte in the name
        raise _failure(path, error) from error
    if mode is not None and not stat.S_ISREG(mode):
        kind = next((kind for is_kind, kind in _KINDS if is_kind(mode)), "something else")
        raise OutputError(f"got {str(path)!r}, which is {kind}, expected a file or a new name: name another")
    return found


@contextmanager
def replacing(path: Path, mode: int = SHARED) -> Iterator[int]:
    """Yield the descriptor of a new file that becomes `path`, or is removed on an error: `put` writes to it.

    Raises `OutputError`, also for an `OSError` in the block.
    """
    found = target(path)
    try:
        with _replacing(found, mode) as fd:
            yield fd
    except OSError as error:
        raise _failure(path, error) from error


def try_out(path: Path, *, makes_folder: bool = False) -> None:
    """Raise `OutputError` unless a file can be written to `path` now.

    makes_folder: a missing folder will be made. To be asked before work that would be lost. An empty file is made and
    removed again.
    """
    found = target(path)
    try:
        with suppress(FileNotFoundError):
            found.lstat()  # a name that is too long, or below a file
        while makes_folder and not os.path.lexists(found.parent):
            found = found.parent
        temporary, fd = _make(found, PRIVATE)
        temporary.unlink()
        os.close(fd)
    except OSError as error:
        raise _failure(path, error) from error


def make_folder(path: Path) -> None:
    """Make a folder and its missing parents, if it is not there. Raises `OutputError`."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _failure(path, error) from error


def put(fd: int, data: memoryview | bytes) -> None:
    """Write all of `data`. Raises `OSError`."""
    left = memoryview(data)
    while left:
        left = left[os.write(fd, left) :]


def write_bytes(path: Path, data: bytes) -> None:
    """Write `data` to `path`, all or nothing. Raises `OutputError`."""
    with replacing(path) as fd:
        put(fd, data)


def write_text(path: Path, text: str) -> None:
    """Write `text` to `path` as UTF-8, all or nothing. Raises `OutputError`."""
    write_bytes(path, text.encode())


def _failure(path: Path, error: OSError | ValueError) -> OutputError:
    why = getattr(error, "strerror", None) or error
    return OutputError(f"got {why} for {path}, expected to write a file there: name a folder that has the room")


@contextmanager
def _replacing(path: Path, mode: int) -> Iterator[int]:
    _remove_left_over(path)
    temporary, fd = _make(path, mode)
    is_open = True
    try:
        yield fd
        os.fsync(fd)
        if fcntl is None:  # Windows renames no open file
            is_open = bool(os.close(fd))
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    finally:
        if is_open:
            os.close(fd)
    with suppress(OSError):  # some file systems cannot do this for a folder; the file is whole all the same
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def _make(path: Path, mode: int) -> tuple[Path, int]:
    while True:
        temporary = path.with_name(f".{path.name[:_KEPT]}.{os.getpid()}.{secrets.token_hex(4)}.tmp")
        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), mode)
        if fcntl is None:
            return temporary, fd
        with suppress(OSError):  # a file system without locks: nobody can lock, so nobody removes
            fcntl.flock(fd, fcntl.LOCK_EX)
        if temporary.exists():
            return temporary, fd
        os.close(fd)  # another writer took it for a left-over before it was locked


def _remove_left_over(path: Path) -> None:
    if fcntl is None:
        return
    names = re.compile(rf"\.{re.escape(path.name[:_KEPT])}\.\d+\.[0-9a-f]{{8}}\.tmp")
    try:
        others = [other for other in path.parent.iterdir() if names.fullmatch(other.name)]
    except OSError:  # the folder can perhaps be written to, but not listed
        return
    for other in others:
        with suppress(OSError):  # its writer lives, or it is not ours to remove
            fd = os.open(other, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if stat.S_ISREG(os.fstat(fd).st_mode):
                    other.unlink()
            finally:
                os.close(fd)
