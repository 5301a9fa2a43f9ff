"""Reading many small pieces of a file, and their check values, without holding a lock of Python's, compiled by numba.

A step fetches hundreds of pieces of a few KiB for every layer. From Python each is a call that needs the interpreter, and
the threads that read stand in the way of the one that computes (docs/LOG.md).
"""

import numba
from numba import types

from attnpred.kernels.numba_tools import compiled

_pread = types.ExternalFunction("pread", types.intp(types.intc, types.intp, types.intp, types.int64))
_memcpy = types.ExternalFunction("memcpy", types.intp(types.intp, types.intp, types.intp))


@compiled("intp(int64, int64[::1], int64, int64, int64, int64, int64)", nogil=True)
def read_many(fd, places, size, target, scratch, room, gap):  # type: ignore[no-untyped-def]
    """Read pieces of `size` bytes at `places` [n], ascending, to the address `target`; return how many came, n or fewer.

    Pieces with at most `gap` bytes between them become one read, by way of `room` bytes at the address `scratch`.
    """
    count = places.shape[0]
    first = 0
    while first < count:
        end = places[first] + size
        last = first + 1
        dense = True
        while last < count:
            between = places[last] - end
            if between < 0 or between > gap or places[last] + size - places[first] > room:
                break
            dense = dense and between == 0
            end = places[last] + size
            last += 1
        wanted = end - places[first]
        where = target + first * size if dense else scratch
        done = 0
        while done < wanted:
            got = _pread(numba.int32(fd), where + done, wanted - done, places[first] + done)
            if got <= 0:
                return first  # the caller reads it once more, in Python, and finds out why
            done += got
        if not dense:
            for piece in range(first, last):
                _memcpy(target + piece * size, scratch + places[piece] - places[first], size)
        first = last
    return count


@compiled("void(int32[:, ::1], int64[::1], int64, int32[::1])", nogil=True)
def unit_checks(words, weights, first, out):  # type: ignore[no-untyped-def]
    """Set out [n] to the upper halves of `first` + sum over j of words [n, w] * weights [w], modulo 2**64."""
    for unit in range(words.shape[0]):
        total = first
        for j in range(words.shape[1]):
            total += numba.int64(words[unit, j]) * weights[j]
        out[unit] = numba.int32(total >> 32)
