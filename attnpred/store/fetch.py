"""`Fetcher`: reads many small pieces of a tier in the background, several at a time.

The pieces of one request come sorted by their places and are dealt out to a few threads in stretches, each of which is one
call of `Tier.read_many`; the check values of what they read are computed there as well. Waiting has a deadline: what does
not come is an error, never a hang.

On a GPU the pieces land in pinned memory, and each thread sends what it has read on a stream of its own.
"""

import contextlib
import os
import queue
import threading
import time
import weakref
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from typing import Any, final

import torch
from torch import Tensor

from attnpred.errors import StoreError, closed_cache, forked_cache
from attnpred.store.codec import checks
from attnpred.store.tier import Tier

THREADS = 4
STOP_TIMEOUT = 0.5
"""Seconds for all threads to end."""
SMALLEST_TASK = 16 << 10
"""Bytes that are not worth a second thread."""


@final
class Fetch:
    """Pieces on their way: `data` uint8 [n, piece], complete after `finish`."""

    def __init__(self, data: Tensor, futures: "list[Future[Tensor]]", stream: Any) -> None:
        self.data, self._futures, self._stream = data, futures, stream

    @property
    def is_done(self) -> bool:
        """True where nothing is to be waited for."""
        return all(future.done() for future in self._futures)

    def finish(self, timeout: float) -> Tensor:
        """Wait for all pieces; return the check values of their units, int32 [n * units of a piece].

        Raises `StoreError`, of a failed read or after `timeout` seconds.
        """
        deadline, found = time.monotonic() + timeout, []
        for future in self._futures:
            try:
                found.append(future.result(max(0.0, deadline - time.monotonic())))
            except FutureTimeoutError:
                raise StoreError(
                    f"got no answer from the slow tier within {timeout:g} s, expected {self.data.shape[0]} pieces of "
                    f"{self.data.shape[1]} bytes: check the disk, or raise fetch_timeout"
                ) from None
        if self._stream is not None:
            torch.cuda.current_stream(self.data.device).wait_stream(self._stream)
        return torch.cat(found)


@final
class Fetcher:
    """Threads that read `tier` until they are closed, or nobody holds this any more."""

    def __init__(self, tier: Tier, threads: int = THREADS) -> None:
        self._tier, self._threads = tier, threads
        self._tasks: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._workers: list[threading.Thread] = []
        self._streams: dict[torch.device, Any] = {}
        self._process = 0
        self.close = weakref.finalize(self, _stop, self._tasks, self._workers)

    def start(self, places: Tensor, size: int, unit: int, device: torch.device) -> Fetch:
        """Begin to read pieces of `size` bytes, units of `unit` bytes each, at `places` [n], ascending, to `device`."""
        if self._workers and self._process != os.getpid():
            raise forked_cache(self._process, os.getpid())
        while len(self._workers) < self._threads:
            worker = threading.Thread(target=_work, args=(self._tasks,), name="attnpred-fetch", daemon=True)
            worker.start()
            self._workers.append(worker)
            self._process = os.getpid()
        on_gpu = device.type == "cuda"
        landing = torch.empty(places.numel(), size, dtype=torch.uint8, pin_memory=on_gpu, device="cpu")
        data, stream = landing, None
        if on_gpu:
            data = torch.empty(places.numel(), size, dtype=torch.uint8, device=device)
            if device not in self._streams:
                self._streams[device] = torch.cuda.Stream(device)
            stream = self._streams[device]
            stream.wait_stream(torch.cuda.current_stream(device))
        step = max(SMALLEST_TASK // size, -(-places.numel() // self._threads), 1)
        futures = []
        for first in range(0, places.numel(), step):
            future: Future[Tensor] = Future()
            part = slice(first, first + step)
            # The task holds the memory that it fills, so giving up on it is safe.
            self._tasks.put((future, self._tier, places[part], unit, landing[part], data[part], stream))
            futures.append(future)
        if not self.close.alive:  # closed meanwhile, perhaps after its queue was emptied: nobody would come
            raise closed_cache()
        return Fetch(data, futures, stream)


def _work(tasks: "queue.SimpleQueue[Any]") -> None:
    """Do tasks until None comes."""
    while (task := tasks.get()) is not None:
        future, tier, places, unit, landing, data, stream = task
        try:
            tier.read_many(places, landing)
            if stream is not None:
                with torch.cuda.stream(stream):
                    data.copy_(landing, non_blocking=True)
            future.set_result(checks(landing.view(-1, unit)))
        except BaseException as error:  # whatever ends the thread's work must end the waiting for it
            future.set_exception(error if isinstance(error, StoreError) else StoreError(f"got {error!r} while reading"))
        del task, future, tier, places, landing, data, stream  # an idle thread keeps nothing alive


def _stop(tasks: "queue.SimpleQueue[Any]", workers: list[threading.Thread]) -> None:
    """End the threads. Also at exit: a thread that computes while the interpreter goes away takes the process with it."""
    with contextlib.suppress(queue.Empty):
        while True:
            task = tasks.get_nowait()
            if task is not None:
                task[0].set_exception(closed_cache())
    for _ in workers:
        tasks.put(None)
    deadline = time.monotonic() + STOP_TIMEOUT
    for worker in workers:
        if worker is not threading.current_thread():
            worker.join(max(0.0, deadline - time.monotonic()))  # one that hangs in the kernel does no harm
