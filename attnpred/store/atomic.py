"""Writing a large file so that nobody ever reads half of it, and nothing is left behind.

The bytes go to a temporary name in the same folder, are forced to the disk, and take their final name in one step. A
temporary file is locked (`flock`) as long as its writer lives, however that ends, and the next writer of the same name
removes those that are not. (The process id in the name is for people: in a container it is often the same one every time,
and two containers may share a folder.)
"""

import os
import re
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]


@contextmanager
def replacing(path: Path) -> Iterator[int]:
    """Yield the descriptor of a new file of mode 0600 that becomes `path`, or is removed on an error. Raises `OSError`."""
    _remove_left_over(path)
    temporary, fd = _make(path)
    try:
        yield fd
        os.fsync(fd)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    finally:
        os.close(fd)
    with suppress(OSError):  # some file systems cannot do this for a folder; the file is whole all the same
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def _make(path: Path) -> tuple[Path, int]:
    while True:
        temporary = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}.tmp")
        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with suppress(OSError):  # a file system without locks: nobody can lock, so nobody removes
            fcntl.flock(fd, fcntl.LOCK_EX)
        if temporary.exists():
            return temporary, fd
        os.close(fd)  # another writer took it for a left-over before it was locked


def _remove_left_over(path: Path) -> None:
    names = re.compile(rf"\.{re.escape(path.name)}\.\d+\.[0-9a-f]+\.tmp")
    for other in path.parent.iterdir():
        if names.fullmatch(other.name):
            with suppress(OSError):  # its writer lives, or it is not ours to remove
                fd = os.open(other, os.O_RDWR | os.O_NOFOLLOW)
                try:
                    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    other.unlink()
                finally:
                    os.close(fd)
