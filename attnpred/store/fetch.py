"""`Fetcher`: reads many small pieces of a tier in the background, several at a time.

The pieces of one request are sorted by their places; neighbours become one read, and so do pieces with a small gap
between them, because a read costs as much as some 16 KiB more of it (`GAP`; docs/LOG.md has the measurement). The reads are
dealt out to a few threads. Waiting has a deadline: what does not come is an error, never a hang.

On a GPU the pieces land in pinned memory, and each thread sends what it has read on a stream of its own.
"""

import queue
import threading
import time
import weakref
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from typing import Any, final

import torch
from torch import Tensor

from attnpred.errors import StoreError
from attnpred.store.tier import Tier, buffer

GAP = 16 << 10
THREADS = 8
SMALLEST_TASK = 4
"""Reads that are not worth a second thread."""
LONGEST_READ = 256 << 10
"""A longer one is dealt out to several threads."""

_Read = tuple[int, int, int, list[memoryview]]
"""Place, first and last piece (excluded), where to."""


@final
class Fetch:
    """Pieces on their way: `data` uint8 [n, piece], complete after `finish`."""

    def __init__(self, data: Tensor, landing: Tensor, futures: "list[Future[None]]", stream: Any) -> None:
        self.data, self._landing, self._futures, self._stream = data, landing, futures, stream

    @property
    def is_done(self) -> bool:
        """True where nothing is to be waited for."""
        return all(future.done() for future in self._futures)

    def finish(self, timeout: float) -> None:
        """Wait for all pieces. Raises `StoreError`, of a failed read or after `timeout` seconds."""
        deadline = time.monotonic() + timeout
        for future in self._futures:
            try:
                future.result(max(0.0, deadline - time.monotonic()))
            except FutureTimeoutError:
                raise StoreError(
                    f"got no answer from the slow tier within {timeout:g} s, expected {self.data.shape[0]} pieces of "
                    f"{self.data.shape[1]} bytes: check the disk, or raise fetch_timeout"
                ) from None
        if self._stream is not None:
            torch.cuda.current_stream(self.data.device).wait_stream(self._stream)


@final
class Fetcher:
    """Threads that read `tier` until they are closed, or nobody holds this any more."""

    def __init__(self, tier: Tier, threads: int = THREADS) -> None:
        self._tier, self._threads = tier, threads
        self._tasks: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._started = False
        self._streams: dict[torch.device, Any] = {}
        self._scrap = bytearray(GAP)
        self.close = weakref.finalize(self, _stop, self._tasks, threads)

    def start(self, places: Tensor, segments: Tensor, size: int, device: torch.device) -> Fetch:
        """Begin to read pieces of `size` bytes at `places` [n], ascending, to `device`; no read crosses `segments` [n]."""
        if not self._started:
            self._started = True
            for _ in range(self._threads):
                threading.Thread(target=_work, args=(self._tasks,), name="attnpred-fetch", daemon=True).start()
        on_gpu = device.type == "cuda"
        landing = torch.empty(places.numel(), size, dtype=torch.uint8, pin_memory=on_gpu)
        data, stream = landing, None
        if on_gpu:
            data = torch.empty(places.numel(), size, dtype=torch.uint8, device=device)
            stream = self._streams.setdefault(device, torch.cuda.Stream(device))
            stream.wait_stream(torch.cuda.current_stream(device))
        reads = self._plan(places.tolist(), segments.tolist(), landing)
        least = 1 if len(reads) * LONGEST_READ <= landing.numel() * 2 else SMALLEST_TASK
        step = max(least, -(-len(reads) // self._threads))
        futures = []
        for first in range(0, len(reads), step):
            future: Future[None] = Future()
            # The task holds the memory that it fills, so giving up on it is safe.
            self._tasks.put((future, self._tier, reads[first : first + step], landing, data, stream))
            futures.append(future)
        return Fetch(data, landing, futures, stream)

    def _plan(self, places: list[int], segments: list[int], landing: Tensor) -> list[_Read]:
        size, view = landing.shape[1], buffer(landing)
        scrap = memoryview(self._scrap)
        reads: list[_Read] = []
        first = 0  # piece where the present read begins
        whole = 0  # piece where its last buffer begins
        buffers: list[memoryview] = []
        for i in range(1, len(places) + 1):
            gap = places[i] - places[i - 1] - size if i < len(places) and segments[i] == segments[i - 1] else -1
            gap = -1 if (i - first) * size >= LONGEST_READ else gap
            if gap == 0:
                continue
            buffers.append(view[whole * size : i * size])
            whole = i
            if 0 < gap <= GAP:
                buffers.append(scrap[:gap])  # nobody looks at it, so all reads may share it
            else:
                reads.append((places[first], first, i, buffers))
                first, buffers = i, []
        return reads


def _work(tasks: "queue.SimpleQueue[Any]") -> None:
    """Do tasks until None comes."""
    while (task := tasks.get()) is not None:
        future, tier, reads, landing, data, stream = task
        try:
            for place, _, _, buffers in reads:
                tier.read(place, buffers)
            if stream is not None:
                first, last = reads[0][1], reads[-1][2]
                with torch.cuda.stream(stream):
                    data[first:last].copy_(landing[first:last], non_blocking=True)
            future.set_result(None)
        except BaseException as error:  # whatever ends the thread's work must end the waiting for it
            future.set_exception(error if isinstance(error, StoreError) else StoreError(f"got {error!r} while reading"))
        del task, future, tier, reads, landing, data, stream  # an idle thread keeps nothing alive


def _stop(tasks: "queue.SimpleQueue[Any]", threads: int) -> None:
    for _ in range(threads):
        tasks.put(None)
