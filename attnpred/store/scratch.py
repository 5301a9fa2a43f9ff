"""`Scratch`: one scratch file of this process, its name, its lock, its end; and the cleaning up after processes that died.

Names are `attnpred-<pid>-<random>.kv`, in a folder of mode 0700 that is the user's own. The life of a file is the life of
its lock (`flock`, which the kernel drops with the process, however that ends): whoever makes a file first removes those
in the folder whose lock can be had. A process that was forked meanwhile holds the lock too, until it ends.

The folder may have other files, saved caches for example, and those are never removed: a scratch file has a name of exactly
that form, and begins with a mark. The mark is written when the lock is held; before, nobody removes the file.
"""

import contextlib
import os
import re
import secrets
from pathlib import Path
from typing import final

from attnpred.errors import StoreError, forked_cache
from attnpred.files import put
from attnpred.folders import make_private, user_cache

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

IS_SUPPORTED = fcntl is not None and hasattr(os, "preadv")
"""Whether this platform has what a file tier needs."""

NAME = re.compile(r"attnpred-[0-9]+-[0-9a-f]{16}\.kv")
MARK = b"attnpred scratch file: removed when nobody holds its lock\n"
BEGIN = 4096
"""Where the places of a file begin, after the mark: aligned, as a saved cache is."""


def absolute(folder: Path | None) -> Path:
    """Return `folder`, by default the one for scratch files in the user's cache folder, as it is seen from anywhere."""
    cache = user_cache()
    try:
        if folder is not None:
            return folder.expanduser().absolute()
    except RuntimeError:
        cache = None
    if cache is None:
        raise StoreError("got a user without a home folder, expected one for scratch files: name a folder")
    return cache / "kv"


def clean(folder: Path) -> None:
    """Remove the scratch files of dead processes from `folder`."""
    for path in folder.iterdir():
        if NAME.fullmatch(path.name):
            # Held by a living process, gone meanwhile, or another user's: not ours to remove.
            with contextlib.suppress(OSError):
                fd = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK)
                try:
                    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    if os.pread(fd, len(MARK), 0) == MARK:
                        path.unlink()
                finally:
                    os.close(fd)


def make(folder: Path) -> tuple[Path, int]:
    """Return the path and the descriptor of a new file in `folder`, locked and marked. Raises `OSError`."""
    path = folder / f"attnpred-{os.getpid()}-{secrets.token_hex(8)}.kv"
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)  # a cleaner that looks at it for a moment leaves it, for it has no mark
        put(fd, MARK)
    except BaseException:  # no locks in this file system, no room, or an interrupt
        os.close(fd)
        path.unlink(missing_ok=True)
        raise
    return path, fd


@final
class Held:
    """A file descriptor that is closed when nobody holds it any more: a call that still runs keeps its number its own."""

    def __init__(self, number: int) -> None:
        self.number = number
        self._process = os.getpid()

    def __del__(self) -> None:
        if self._process == os.getpid():  # a fork may have closed it, and given the number to another file
            os.close(self.number)


@final
class Scratch:
    """One scratch file, from `open` to `close`, of the process that opened it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.path: Path | None = None
        self._fd: Held | None = None
        self._process = os.getpid()
        self._is_closed = False

    def open(self) -> None:
        """Clean the folder and make the file, if there is none yet. Raises `OSError`."""
        if self.path is None and not self._is_closed:
            make_private(self.folder)
            clean(self.folder)
            self._process = os.getpid()
            self.path, number = make(self.folder)
            self._fd = Held(number)

    @property
    def fd(self) -> Held:
        """The descriptor, to be held as long as it is used; raises `StoreError` where there is none to use."""
        if self._process != os.getpid():
            # Two processes would give the same bytes of the one file to different blocks.
            raise forked_cache(self._process, os.getpid())
        if self._fd is None:
            raise StoreError(f"got a call for a scratch file in {self.folder}, expected it open: close last")
        return self._fd

    def close(self) -> None:
        """Remove the file; the file of another process, which a fork inherits, is left alone."""
        if self._process == os.getpid():
            self._is_closed = True
            if self.path is not None:
                # By its name first: as long as it has one it is also locked.
                with contextlib.suppress(OSError):
                    self.path.unlink(missing_ok=True)
            self._fd = None
