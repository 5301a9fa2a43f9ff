"""Reading a file from a given place on, without a position of its own, so that any thread may read at any time.

Pieces with a small gap between them become one read, because a read costs as much as some 16 KiB more of it (docs/LOG.md).
Where numba is installed, one call does it for many pieces, and does not hold the interpreter meanwhile.
"""

import os
from collections.abc import Sequence
from importlib.util import find_spec

import torch
from torch import Tensor

from attnpred.errors import StoreError
from attnpred.store.tier import buffer

GAP = 16 << 10
LONGEST = 256 << 10
"""Bytes of one read, at most, unless a piece is larger."""

_HAS_NUMBA = find_spec("numba") is not None
_MOST_BUFFERS = 1024  # of one call: IOV_MAX of Linux and macOS


def read_many(fd: int, places: Tensor, into: Tensor, name: str) -> None:
    """Fill into [n, size], uint8, with the pieces of the file at places [n], ascending; `name` is the file's, for errors."""
    done = _read_natively(fd, places, into) if _HAS_NUMBA else 0
    if done == places.numel():
        return
    # What a native call could not read is read here, for the error if nothing else.
    known, size, view = places.tolist(), into.shape[1], buffer(into)
    scrap = memoryview(bytearray(GAP))
    first = begun = done  # pieces where the present read, and its last buffer, begin
    buffers: list[memoryview] = []
    for i in range(done + 1, len(known) + 1):
        gap = known[i] - known[i - 1] - size if i < len(known) else -1
        gap = gap if i < len(known) and known[i] + size - known[first] <= LONGEST else -1
        if gap == 0:
            continue
        buffers.append(view[begun * size : i * size])
        begun = i
        if 0 < gap <= GAP:
            buffers.append(scrap[:gap])
        else:
            read_fully(fd, known[first], buffers, name)
            first, buffers = i, []


def _read_natively(fd: int, places: Tensor, into: Tensor) -> int:
    """Return how many pieces were read; fewer than all of them after an error."""
    from attnpred.kernels.numba_read import read_many as read  # compiled when it is first needed
    from attnpred.kernels.numba_tools import address

    scratch = torch.empty(LONGEST, dtype=torch.uint8, device="cpu")
    target, spare = address(into, torch.uint8), address(scratch, torch.uint8)
    return int(read(fd, places.numpy(), into.shape[1], target, spare, LONGEST, GAP))


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
