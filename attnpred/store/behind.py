"""`Behind`: a tier that is written behind the caller's back, by one thread, in order.

A write is copied and queued; a read of what is still in the queue is answered from there, and one that the queue answers
only in part waits for the writer. At most `limit` bytes are queued, a longer write alone.

Nothing waits for ever. Whatever ends the writer, an error of the tier or a `SystemExit`, is kept and raised by every later
call, for what was queued is lost; and every wait has a deadline, for a thread or a device that just stops.

The thread knows only the queue, not the `Behind`: when the last reference to that goes, the thread ends and the tier is
closed.
"""

import os
import threading
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from typing import NamedTuple, final

from torch import Tensor

from attnpred.errors import StoreError, forked_cache
from attnpred.store.host import scatter
from attnpred.store.tier import Tier


class Write(NamedTuple):
    """Bytes on their way to `place`."""

    place: int
    data: bytes

    def touches(self, start: int, stop: int) -> bool:
        """Whether it has any of the bytes `start` to `stop`."""
        return self.place < stop and start < self.place + len(self.data)

    def covers(self, start: int, stop: int) -> bool:
        """Whether it has all of them."""
        return self.place <= start and stop <= self.place + len(self.data)


class Queue:
    """What the callers and the writer share. `changed` is held where its attributes are changed."""

    def __init__(self, tier: Tier, timeout: float) -> None:
        self.tier, self.timeout = tier, timeout
        self.changed = threading.Condition()
        self.writes: deque[Write] = deque()
        self.bytes = 0
        self.is_writing = False
        """Whether the writer is at the first of `writes`."""
        self.failure: BaseException | None = None
        self.is_closed = False
        self.thread: threading.Thread | None = None
        self.process = 0

    @property
    def is_foreign(self) -> bool:
        """Whether this is a fork's copy: it has no writer, and its lock may be held for ever."""
        return self.thread is not None and self.process != os.getpid()

    def start(self) -> None:
        """Start the writer if there is none yet."""
        if self.thread is None:
            thread = threading.Thread(target=work, args=(self,), name="attnpred-writer", daemon=True)
            try:
                thread.start()
            except RuntimeError as error:
                raise StoreError(f"got no writer thread ({error}), expected one: end some other threads") from error
            self.thread, self.process = thread, os.getpid()

    def check(self) -> None:
        """Raise `StoreError` unless there is somebody to rely on."""
        if self.is_foreign:
            raise forked_cache(self.process, os.getpid())
        if self.is_closed:
            raise StoreError("got a call after `close`, expected none: close last")
        if self.failure is not None:
            raise StoreError(
                f"got {type(self.failure).__name__} from a write in the background, expected none: what it should have "
                f"written is lost, make a new cache ({self.failure})"
            ) from self.failure
        if self.thread is not None and not self.thread.is_alive():
            raise StoreError("got a writer thread that has ended, expected it alive: make a new cache")

    def wait(self, is_ready: Callable[[], bool]) -> None:
        """Give `changed` away until `is_ready`; raise `StoreError` when that cannot be or takes too long."""
        self.check()
        in_time = self.changed.wait_for(lambda: is_ready() or self.is_closed, self.timeout)
        self.check()
        if not in_time:
            raise StoreError(
                f"got {self.bytes} bytes still to write after {self.timeout} s, expected fewer: is the device stuck?"
            )

    def newest(self, start: int, stop: int) -> Write | None:
        """Return the last queued write that has any of the bytes `start` to `stop`."""
        return next((write for write in reversed(self.writes) if write.touches(start, stop)), None)

    def drop(self, start: int, stop: int) -> None:
        """Forget what is queued for the bytes `start` to `stop`, but for what is being written."""
        kept = [
            write
            for index, write in enumerate(self.writes)
            if not write.touches(start, stop) or (index == 0 and self.is_writing)
        ]
        self.writes = deque(kept)
        self.bytes = sum(len(write.data) for write in kept)
        self.changed.notify_all()

    def first(self) -> Write | None:
        """Wait for the next thing to write; None when there will be none."""
        with self.changed:
            self.changed.wait_for(lambda: self.writes or self.is_closed)
            if self.is_closed:
                return None
            self.is_writing = True
            return self.writes[0]

    def done(self) -> None:
        """The first write is."""
        with self.changed:
            self.is_writing = False
            if not self.is_closed:
                self.bytes -= len(self.writes.popleft().data)
            self.changed.notify_all()

    def forget(self, failure: BaseException | None = None) -> None:
        """Free what is queued, so that nobody waits for it; remember why."""
        with self.changed:
            self.failure = failure
            self.writes.clear()
            self.bytes = 0
            self.changed.notify_all()


def work(queue: Queue) -> None:
    """The writer thread."""
    try:
        while (write := queue.first()) is not None:
            queue.tier.write(write.place, memoryview(write.data))
            del write  # an idle thread keeps nothing alive
            queue.done()
    except BaseException as error:
        # Without its frames, which know the queue: that would be a cycle.
        queue.forget(error.with_traceback(None))
    if queue.is_closed:
        queue.tier.close()


def finish(queue: Queue) -> None:
    """End the writer and close the tier; what is still queued need not be written."""
    if queue.is_foreign:
        return
    with queue.changed:
        queue.is_closed = True
        queue.changed.notify_all()
    if queue.thread is threading.current_thread():
        return  # collected there, perhaps in the middle of a write; it closes the tier as it ends
    if queue.thread is not None:
        queue.thread.join(queue.timeout)
    queue.forget()
    queue.tier.close()


@final
class Behind(Tier):
    """`tier`, written in the background; it is its own from now on."""

    def __init__(self, tier: Tier, limit: int = 16 << 20, timeout: float = 60.0) -> None:
        self._tier, self._limit = tier, limit
        self._queue = Queue(tier, timeout)
        # After the tier's own, so that at exit, in reverse order, the writer ends before its file is closed.
        self._finalizer = weakref.finalize(self, finish, self._queue)

    @property
    def pending_bytes(self) -> int:
        """Bytes that are queued."""
        return self._queue.bytes

    def allocate(self, size: int) -> int:
        self._queue.check()
        return self._tier.allocate(size)

    def release(self, place: int, size: int) -> None:
        queue, stop = self._queue, place + size
        queue.check()
        with queue.changed:
            queue.drop(place, stop)
            queue.wait(lambda: queue.newest(place, stop) is None)
        self._tier.release(place, size)

    def write(self, place: int, data: memoryview) -> None:
        queue, size = self._queue, len(data)
        queue.check()
        with queue.changed:
            queue.start()
            queue.wait(lambda: not queue.writes or queue.bytes + size <= self._limit)
            queue.writes.append(Write(place, bytes(data)))
            queue.bytes += size
            queue.changed.notify_all()

    def read(self, place: int, buffers: Sequence[memoryview]) -> None:
        queue, stop = self._queue, place + sum(map(len, buffers))
        queue.check()
        with queue.changed:
            write = queue.newest(place, stop)
            if write is not None and not write.covers(place, stop):
                queue.wait(lambda: queue.newest(place, stop) is None)
                write = None
        if write is None:
            self._tier.read(place, buffers)
        else:
            scatter(memoryview(write.data)[place - write.place :], buffers)

    def read_many(self, places: Tensor, into: Tensor) -> None:
        queue, size = self._queue, into.shape[1]
        queue.check()
        with queue.changed:
            is_queued = any(queue.newest(place, place + size) for place in places.tolist()) if queue.writes else False
        if is_queued:
            super().read_many(places, into)
        else:
            self._tier.read_many(places, into)

    def flush(self) -> None:
        self._queue.check()
        with self._queue.changed:
            self._queue.wait(lambda: not self._queue.writes)
        self._tier.flush()

    def drop_page_cache(self) -> None:
        self.flush()
        self._tier.drop_page_cache()

    def used(self) -> dict[str, int]:
        return self._tier.used()

    def describe(self) -> str:
        return self._tier.describe()

    def close(self) -> None:
        self._finalizer()
