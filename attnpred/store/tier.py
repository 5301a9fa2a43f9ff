"""`Tier`: bytes that lie outside fast memory: in host memory, in a file, in a chain of both, in the fake of the tests.

A tier is addressed by bytes. `allocate` gives a *place*, the first byte of a stretch; any part of a stretch can be
written and read, and stretches are given back whole. It knows nothing of blocks: `TieredStore` does.

You may assume:
    * a read gives exactly what was last written there, or raises `StoreError`, which names the file or the memory;
    * reads may run in several threads at once, also beside writes to other places; a read that follows the return of a
      `write` to the same place, in any thread, sees it;
    * nothing is left behind, in memory or in the file system, after `close` (a second one does nothing), after the object
      was collected, or after the interpreter has left.

You must:
    * stay inside the stretches that you allocated, and not read what was never written;
    * bring buffers that stay alive and unchanged until the call returns;
    * `release` a stretch with the place and size it was allocated with, once, when nobody reads it any more.
"""

import ctypes
from abc import ABC, abstractmethod
from collections.abc import Sequence

from torch import Tensor


class Tier(ABC):
    """Interface; concrete tiers are final."""

    @abstractmethod
    def allocate(self, size: int) -> int:
        """Return the place of `size` new bytes. Raises `TierFullError` if there is no room."""

    @abstractmethod
    def release(self, place: int, size: int) -> None:
        """Give a stretch back."""

    @abstractmethod
    def write(self, place: int, data: memoryview) -> None:
        """Write `data` from `place` on."""

    @abstractmethod
    def read(self, place: int, buffers: Sequence[memoryview]) -> None:
        """Fill `buffers`, one after the other, with the bytes from `place` on."""

    def read_many(self, places: Tensor, into: Tensor) -> None:
        """Fill into [n, size], uint8 in host memory, with the bytes at places [n], int64, ascending; several stretches."""
        for place, row in zip(places.tolist(), into, strict=True):
            self.read(place, [buffer(row)])

    @abstractmethod
    def flush(self) -> None:
        """Return when everything written so far has reached the tier itself; raise what went wrong with it."""

    def drop_page_cache(self) -> None:
        """Let the operating system forget what it keeps of it in memory: for benchmarks, which want to see the device."""

    @abstractmethod
    def used(self) -> dict[str, int]:
        """Return the bytes in use by kind of memory: "host", "disk"."""

    @abstractmethod
    def describe(self) -> str:
        """Return what an error calls it: the file's path, or "host memory"."""

    @abstractmethod
    def close(self) -> None:
        """Free everything."""


def buffer(tensor: Tensor) -> memoryview:
    """Return the memory of a contiguous tensor in host memory as writable bytes; keep the tensor alive meanwhile."""
    assert tensor.is_contiguous() and tensor.device.type == "cpu"
    size = tensor.numel() * tensor.element_size()
    return memoryview((ctypes.c_char * size).from_address(tensor.data_ptr() if size else 0)).cast("B")
