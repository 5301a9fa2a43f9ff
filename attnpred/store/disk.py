"""`DiskTier`: one scratch file, made when the first bytes are spilled and gone when the tier is (`scratch.py`).

Room is reserved as it is allocated, so a disk that is full says so then and not in the middle of a write. Stretches that
were given back serve again for the same size, which is the common case; all at once, they give the file's room back.
A limit is one for the size of the file, but for the mark that it begins with.

Nothing waits for the device (`fsync`) but `drop_page_cache`: the file does not outlive the process, so the kernel may
keep what it can in memory. A device that fails is met by a read, or by who checks what it read.
"""

import contextlib
import errno
import os
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from threading import Lock
from typing import final

from torch import Tensor

from attnpred.errors import StoreError, TierFullError
from attnpred.store.positioned import read_fully, read_many
from attnpred.store.scratch import BEGIN, IS_SUPPORTED, Scratch, absolute
from attnpred.store.tier import Tier

BYTES_PER_CALL = 1 << 30
"""Below what any system takes at once."""
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
CANNOT_RESERVE = (errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL, errno.ENODEV)

# What macOS lacks: there a file is made longer without its room being reserved, and no advice is given.
FALLOCATE: Callable[[int, int, int], None] = getattr(
    os, "posix_fallocate", lambda fd, start, size: os.ftruncate(fd, start + size)
)
FADVISE: Callable[[int, int, int, int], None] = getattr(os, "posix_fadvise", lambda *_: None)
RANDOM: int = getattr(os, "POSIX_FADV_RANDOM", 0)
DONTNEED: int = getattr(os, "POSIX_FADV_DONTNEED", 0)


def reserve(fd: int, start: int, size: int) -> None:
    """Make the file `start + size` bytes long and, where that can be done, sure of its room; or leave it as it was."""
    try:
        FALLOCATE(fd, start, size)
    except OSError as error:
        if error.errno not in CANNOT_RESERVE:
            os.ftruncate(fd, start)  # a part may have been reserved
            raise
        os.ftruncate(fd, start + size)


def advise(fd: int, advice: int) -> None:
    """Tell the kernel what to expect; nothing depends on it."""
    with contextlib.suppress(OSError):
        FADVISE(fd, 0, 0, advice)


@final
class DiskTier(Tier):
    """Bytes in a file in `folder` (default: in the user's cache folder), at most `limit` of them."""

    def __init__(self, folder: Path | None = None, limit: int | None = None) -> None:
        if not IS_SUPPORTED:
            raise StoreError(
                "got a platform without flock and preadv, expected Linux or macOS: keep the cache in memory"
            )
        self._scratch = Scratch(absolute(folder))
        self._limit = limit
        self._lock = Lock()
        self._free: dict[int, list[int]] = {}
        self._end, self._used = BEGIN, 0
        self._finalizer = weakref.finalize(self, self._scratch.close)

    @property
    def path(self) -> Path | None:
        """The file; None before the first `allocate`."""
        return self._scratch.path

    def allocate(self, size: int) -> int:
        with self._lock:
            place = self._free[size].pop() if self._free.get(size) else self._append(size)
            self._used += size
            return place

    def _append(self, size: int) -> int:
        end = self._end
        name = self.describe()
        taken = end - BEGIN
        if self._limit is not None and taken + size > self._limit:
            raise TierFullError(
                f"got {size} bytes for {name} with {taken} of {self._limit} taken, expected room for them: raise its limit"
            )
        try:
            self._scratch.open()
            fd = self._scratch.fd
            advise(fd.number, RANDOM)
            reserve(fd.number, end, size)
        except OSError as error:
            kind = TierFullError if error.errno in FULL else StoreError
            raise kind(
                f"got {error.strerror!r} for {size} bytes more than {taken} in {name}, expected room in a folder that can "
                f"be written and locked: free some, or name another folder"
            ) from error
        self._end += size
        return end

    def release(self, place: int, size: int) -> None:
        fd = self._scratch.fd
        with self._lock:
            self._used -= size
            self._free.setdefault(size, []).append(place)
            if not self._used:
                self._free.clear()
                self._end = BEGIN
                with contextlib.suppress(OSError):  # kept, then, and used again
                    os.ftruncate(fd.number, BEGIN)

    def write(self, place: int, data: memoryview) -> None:
        fd, done = self._scratch.fd, 0
        while done < len(data):
            try:
                done += os.pwrite(fd.number, data[done : done + BYTES_PER_CALL], place + done)
            except OSError as error:
                raise StoreError(
                    f"got {error.strerror!r} at byte {place + done} of {self.path}, expected to write it: check the "
                    f"disk it is on, or name another folder"
                ) from error

    def read(self, place: int, buffers: Sequence[memoryview]) -> None:
        fd = self._scratch.fd
        read_fully(fd.number, place, buffers, str(self.path))

    def read_many(self, places: Tensor, into: Tensor) -> None:
        fd = self._scratch.fd
        read_many(fd.number, places, into, str(self.path))

    def flush(self) -> None:
        """Do nothing: what was written is read back, from the kernel's memory or from the device."""

    def drop_page_cache(self) -> None:
        """Have the next reads come from the device: for benchmarks. Raises `OSError`."""
        if self.path is not None:
            fd = self._scratch.fd
            os.fsync(fd.number)
            advise(fd.number, DONTNEED)

    def used(self) -> dict[str, int]:
        return {"disk": self._used}

    def describe(self) -> str:
        return str(self.path or f"a file in {self._scratch.folder}")

    def close(self) -> None:
        self._finalizer()
        with self._lock:
            self._free.clear()
            self._end, self._used = BEGIN, 0
