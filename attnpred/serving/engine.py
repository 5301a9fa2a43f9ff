"""`Engine`: the one thread that owns the model, and gives every request its turns.

    waiting    requests in the order they came; a full queue refuses the next one, with a time to come back
    reading    prompts, in turns, a block of tokens each; documents that nobody waits for come after them
    writing    a step of all answers at once

While answers are written, reading gets no more time than they do: so a long prompt comes in between them without stopping
them. A request ends in one event, `Done` or `Failed`, however it ends; if it was cancelled, in none. Its memory is free when
the turn is over in which it ended. A request that fails ends alone.
"""

import logging
import threading
import time
from collections import deque
from dataclasses import dataclass
from typing import Any, final

from attnpred.errors import AttnpredError
from attnpred.serving.admission import Admission
from attnpred.serving.answers import Row, rows_of, step
from attnpred.serving.chain import BlockStore
from attnpred.serving.job import BusyError, Done, Failed, Job, Read, StoppingError, TooLateError
from attnpred.serving.prefill import Prefill
from attnpred.serving.seeds import Seeds

logger = logging.getLogger("attnpred")


@final
@dataclass(frozen=True, slots=True)
class Limits:
    """running: answers at a time; waiting: requests in the queue; memory: bytes of their caches; seeds: of documents'."""

    running: int = 64
    waiting: int = 64
    memory: int = 8 << 30
    seeds: int = 1 << 30


@final
class _Active:
    """A request that is read or answered."""

    def __init__(self, job: Job, prefill: Prefill) -> None:
        self.job, self.prefill = job, prefill
        self.rows: list[Row] = []
        self.began = time.monotonic()
        self.read = 0.0
        """When the prompt was read."""

    def close(self) -> None:
        self.prefill.close()
        for row in self.rows:
            row.close()


@final
class Engine:
    """model: attached. root: what keys and values depend on beside owner and tokens (`attnpred.hf.made_by`)."""

    def __init__(self, model: Any, root: str, store: BlockStore, limits: Limits) -> None:
        self.model, self.root, self.store, self.limits = model, root, store, limits
        self.admission, self.seeds = Admission(model, limits.memory), Seeds(limits.seeds)
        self._changed = threading.Condition()
        self._waiting: deque[Job] = deque()
        self._reading: deque[_Active] = deque()
        self._writing: list[_Active] = []
        self._owed = 0.0
        """Seconds that reading has had more than writing."""
        self._seconds = 1.0
        """What a request takes, about."""
        self._is_stopping = False
        self._thread = threading.Thread(target=self._run, name="attnpred engine", daemon=True)

    def start(self) -> None:
        """Begin to serve."""
        self._thread.start()

    def submit(self, job: Job) -> None:
        """Put a request into the queue. Raises `BusyError`, `StoppingError`, and `TierFullError` for one too large."""
        self.admission.check(job)
        with self._changed:
            if self._is_stopping:
                raise StoppingError("got a request while the server stops, expected it earlier: ask another one")
            if len(self._waiting) >= self.limits.waiting:
                raise BusyError(max(1, round(self._seconds * len(self._waiting) / max(1, self.running))))
            self._waiting.append(job)
            self._changed.notify()

    def cancel(self, job: Job) -> None:
        """End a request that nobody listens to any more; no event comes after the turn that runs."""
        job.is_cancelled = True
        with self._changed:
            self._changed.notify()

    def close(self, patience: float = 0.0) -> None:
        """Take no more requests, give those that are here `patience` seconds, and end."""
        until = time.monotonic() + patience
        with self._changed:
            self._is_stopping = True
            for job in (*self._waiting, *(one.job for one in (*self._reading, *self._writing))):
                job.deadline = min(job.deadline, until)
            self._changed.notify()
        self._thread.join()
        self.seeds.close()
        self.store.close()

    @property
    def queued(self) -> int:
        """How many requests wait."""
        return len(self._waiting)

    @property
    def running(self) -> int:
        """How many are read or answered."""
        return len(self._reading) + len(self._writing)

    def _run(self) -> None:
        while self._wait():
            self._end_the_late()
            self._begin()
            if self._reading and (self._owed <= 0 or not self._writing):
                self._owed += self._timed(self._read_on)
            if self._writing:
                self._owed -= self._timed(self._write_on)
            self._owed = max(0.0, self._owed) if self._writing else 0.0

    def _wait(self) -> bool:
        """Wait for work; return False where there is none and none will come."""
        with self._changed:
            while not (self._waiting or self._reading or self._writing):
                if self._is_stopping:
                    return False
                self._changed.wait()
        return True

    @staticmethod
    def _timed(turn: Any) -> float:
        began = time.monotonic()
        turn()
        return time.monotonic() - began

    def _end_the_late(self) -> None:
        """Let go of requests that were cancelled, or have had their time."""
        now = time.monotonic()
        with self._changed:
            gone = [job for job in self._waiting if job.is_cancelled or now > job.deadline]
            for job in gone:
                self._waiting.remove(job)
        for job in gone:
            _tell_late(job)
        for one in [one for one in (*self._reading, *self._writing) if one.job.is_cancelled or now > one.job.deadline]:
            self._leave(one)
            _tell_late(one.job)

    def _begin(self) -> None:
        """Admit those who wait, in their order, as far as there is room."""
        while self._waiting and self.running < self.limits.running:
            job = self._waiting[0]
            if not self.admission.fits(job):
                return
            with self._changed:
                self._waiting.popleft()
            self.admission.take(job)
            root = f"{self.root} {job.owner}"
            given = (self.model, self.store, self.seeds, root, job.ids, job.policy, job.settings, job.common)
            self._reading.append(_Active(job, Prefill(*given)))

    def _read_on(self) -> None:
        """A block of the prompt whose turn it is."""
        one = next((one for one in self._reading if not one.job.is_document), self._reading[0])
        self._reading.remove(one)
        self._reading.append(one)
        prefill, job = one.prefill, one.job
        try:
            logits = prefill.advance()
            job.tell(Read(prefill.done, prefill.total, prefill.reused))
            if not prefill.is_over:
                return
            one.read = time.monotonic()
            self._reading.remove(one)
            if logits is not None:
                assert prefill.cache is not None
                cache, prefill.cache = prefill.cache, None
                one.rows = rows_of(job, cache, logits)
            self._writing.append(one)
            self._end_if_over(one)
        except Exception as error:
            self._fail(one, error)

    def _write_on(self) -> None:
        """A token of every answer."""
        rows = {row: one for one in self._writing for row in one.rows if not row.is_over}
        for row, error in step(self.model, list(rows)).items():
            if rows[row] in self._writing:
                self._fail(rows[row], error)
        for one in list(self._writing):
            self._end_if_over(one)

    def _end_if_over(self, one: _Active) -> None:
        if not all(row.is_over for row in one.rows):
            return
        self._leave(one)
        now, prefill = time.monotonic(), one.prefill
        if not one.job.is_document:
            self._seconds += (now - one.began - self._seconds) / 8
        one.job.tell(
            Done(
                prompt=prefill.total,
                reused=prefill.reused,
                new=sum(row.count for row in one.rows),
                prompt_ms=1e3 * (one.read - one.began),
                new_ms=1e3 * (now - one.read),
                waited_ms=1e3 * (one.began - one.job.asked),
            )
        )

    def _fail(self, one: _Active, error: Exception) -> None:
        if not isinstance(error, AttnpredError):
            logger.error("a request failed", exc_info=error)
        self._leave(one)
        one.job.tell(Failed(error))

    def _leave(self, one: _Active) -> None:
        """Free what a request has taken."""
        if one in self._reading:
            self._reading.remove(one)
        if one in self._writing:
            self._writing.remove(one)
        one.close()
        self.admission.give_back(one.job)


def _tell_late(job: Job) -> None:
    if not job.is_cancelled:
        job.tell(
            Failed(TooLateError("got no more time for this request, expected it to end earlier: ask for fewer tokens"))
        )
