"""`HostTier`: host memory, pinned where a GPU is to fetch from it without a detour.

A stretch is a tensor of bytes. Places are never used twice, so a list of starts in rising order finds the stretch of any
place by bisection, and a call with a place that was given back is an error rather than somebody else's bytes.
"""

from bisect import bisect_right
from collections.abc import Sequence
from threading import Lock
from typing import final

import torch
from torch import Tensor

from attnpred.errors import StoreError, TierFullError
from attnpred.store.tier import Tier, buffer


def scatter(memory: memoryview, buffers: Sequence[memoryview]) -> None:
    """Fill `buffers`, one after the other, from the start of `memory`."""
    first = 0
    for target in buffers:
        target[:] = memory[first : first + len(target)]
        first += len(target)


@final
class HostTier(Tier):
    """Bytes in host memory, at most `limit` of them."""

    def __init__(self, limit: int | None = None, pin: bool = False) -> None:
        if pin and not torch.cuda.is_available():
            raise StoreError("got pin=True, expected a GPU that could use pinned memory: leave `pin` out")
        self._limit, self._pin = limit, pin
        # Held for the look-up only, never while bytes are copied.
        self._lock = Lock()
        self._starts: list[int] = []
        self._stretches: list[tuple[Tensor, memoryview]] = []
        self._next = self._used = 0

    def allocate(self, size: int) -> int:
        with self._lock:
            if self._limit is not None and self._used + size > self._limit:
                raise TierFullError(
                    f"got {size} bytes for host memory with {self._used} of {self._limit} in use, expected room for "
                    f"them: raise its limit"
                )
            self._used += size
        try:
            # Outside the lock: to pin much memory takes a while.
            memory = torch.empty(size, dtype=torch.uint8, pin_memory=self._pin, device="cpu")
        except RuntimeError as error:
            with self._lock:
                self._used -= size
            raise TierFullError(
                f"got no {size} bytes of host memory, expected as much to be free: use a smaller context, or a file"
            ) from error
        with self._lock:
            place, self._next = self._next, self._next + max(size, 1)
            self._starts.append(place)
            self._stretches.append((memory, buffer(memory)))
        return place

    def release(self, place: int, size: int) -> None:
        with self._lock:
            index = self._index(place, size)
            del self._starts[index], self._stretches[index]
            self._used -= size

    def _index(self, place: int, size: int) -> int:
        index = bisect_right(self._starts, place) - 1
        if index < 0 or place + size > self._starts[index] + len(self._stretches[index][1]):
            raise StoreError(
                f"got bytes {place} to {place + size} of host memory, expected a part of one stretch that is not released"
            )
        return index

    def _find(self, place: int, size: int) -> tuple[Tensor, memoryview]:
        """Return the memory from `place` on, after the tensor that keeps it alive."""
        with self._lock:
            index = self._index(place, size)
            tensor, memory = self._stretches[index]
            first = place - self._starts[index]
        return tensor, memory[first : first + size]

    def write(self, place: int, data: memoryview) -> None:
        _alive, memory = self._find(place, len(data))
        memory[:] = data

    def read(self, place: int, buffers: Sequence[memoryview]) -> None:
        _alive, memory = self._find(place, sum(map(len, buffers)))
        scatter(memory, buffers)

    def flush(self) -> None:
        """Do nothing: what was written is there."""

    def used(self) -> dict[str, int]:
        return {"host": self._used}

    def describe(self) -> str:
        return "host memory"

    def close(self) -> None:
        with self._lock:
            self._starts, self._stretches, self._used = [], [], 0
