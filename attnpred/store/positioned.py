"""Reading a file from a given place on, without a position of its own, so that any thread may read at any time."""

import os
from collections.abc import Sequence

from attnpred.errors import StoreError

_MOST_BUFFERS = 1024  # of one call: IOV_MAX of Linux and macOS


def read_fully(fd: int, place: int, buffers: Sequence[memoryview], name: str) -> None:
    """Fill `buffers` (of bytes), one after the other, from byte `place` on; `name` is the file's, for errors."""
    index, done = 0, 0  # the first buffer that is not full, and how much of it is
    while index < len(buffers):
        batch = [buffers[index][done:], *buffers[index + 1 : index + _MOST_BUFFERS]]
        try:
            got = os.preadv(fd, batch, place)
        except OSError as error:
            raise StoreError(
                f"got {error.strerror or error} at byte {place} of {name}, expected to read it: check the disk it is on"
            ) from error
        if got == 0 and any(batch):
            raise StoreError(f"got the end of {name} at byte {place}, expected more: something made the file shorter")
        place, done = place + got, done + got
        while index < len(buffers) and done >= len(buffers[index]):
            done -= len(buffers[index])
            index += 1
