"""`FakeTier`: another tier with trouble by script, for tests of what reads through a tier: late, failing, wrong, or never.

Set its attributes at any time. Errors are used up one per call, in order; None lets a call pass.
"""

import time
from collections.abc import Sequence
from threading import Event, Lock
from typing import final

from attnpred.store.tier import Tier


def next_of(script: list[BaseException | None]) -> BaseException | None:
    """Take the next error off a script; None at its end."""
    return script.pop(0) if script else None


@final
class FakeTier(Tier):
    """`inner`, with scripted trouble and counted calls."""

    def __init__(self, inner: Tier) -> None:
        self.inner = inner
        self.delay = 0.0
        """Seconds before every read."""
        self.fail_reads: list[BaseException | None] = []
        self.fail_writes: list[BaseException | None] = []
        self.corrupt_next = 0
        """How many of the next reads get one byte wrong."""
        self.hang, self.hang_writes = Event(), Event()
        """Reads and writes wait until these are set, as they are at first."""
        self.hang.set()
        self.hang_writes.set()
        self.reads = self.writes = self.bytes_read = 0
        self._lock = Lock()

    def allocate(self, size: int) -> int:
        return self.inner.allocate(size)

    def release(self, place: int, size: int) -> None:
        self.inner.release(place, size)

    def write(self, place: int, data: memoryview) -> None:
        with self._lock:
            self.writes += 1
            error = next_of(self.fail_writes)
        self.hang_writes.wait()
        if error is not None:
            raise error
        self.inner.write(place, data)

    def read(self, place: int, buffers: Sequence[memoryview]) -> None:
        with self._lock:
            self.reads += 1
            self.bytes_read += sum(map(len, buffers))
            error = next_of(self.fail_reads)
            is_wrong = self.corrupt_next > 0
            self.corrupt_next -= is_wrong
        self.hang.wait()
        time.sleep(self.delay)
        if error is not None:
            raise error
        self.inner.read(place, buffers)
        if is_wrong:
            target = next(filter(None, buffers))
            target[0] ^= 0xFF

    def flush(self) -> None:
        self.inner.flush()

    def drop_page_cache(self) -> None:
        self.inner.drop_page_cache()

    def used(self) -> dict[str, int]:
        return self.inner.used()

    def describe(self) -> str:
        return self.inner.describe()

    def close(self) -> None:
        self.inner.close()
