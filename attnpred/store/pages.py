"""Huge pages: random blocks of a large cache miss the table of 4 KiB pages nearly every time, of 2 MiB pages rarely.

Linux gives them to memory that asks (`madvise`), where the machine's settings are "madvise" or "always"; elsewhere nothing
happens. What they win is in docs/LOG.md. Nothing is allocated that would not be: only whole huge pages inside a tensor ask.
"""

import ctypes
import functools
import sys
from collections.abc import Callable

from torch import Tensor

HUGE_PAGE = 1 << 21
_MADV_HUGEPAGE = 14


@functools.cache
def _madvise() -> Callable[[int, int, int], int] | None:
    """Return the C library's function, None if there is none."""
    if not sys.platform.startswith("linux"):
        return None
    try:
        found = ctypes.CDLL(None).madvise
    except (OSError, AttributeError):
        return None
    found.argtypes, found.restype = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int), ctypes.c_int
    return lambda address, size, advice: int(found(address, size, advice))


def ask_for_huge_pages(tensor: Tensor) -> bool:
    """Ask for huge pages under `tensor`, best before it is first written to; return whether the system agreed."""
    advise = _madvise()
    if advise is None or tensor.device.type != "cpu":
        return False
    first = -(-tensor.data_ptr() // HUGE_PAGE) * HUGE_PAGE
    last = (tensor.data_ptr() + tensor.numel() * tensor.element_size()) // HUGE_PAGE * HUGE_PAGE
    return last > first and advise(first, last - first, _MADV_HUGEPAGE) == 0
