"""Writes in the background: what is queued can be read, what fails is heard of, nothing waits for ever."""

import gc
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress

import pytest
import torch

from attnpred.errors import StoreError
from attnpred.store import behind
from attnpred.store.behind import Behind
from attnpred.store.fake import FakeTier
from attnpred.store.host import HostTier
from tests.store.test_disk import end_of, forked

SOON = 0.05
LATE = 10.0


class Setup:
    """A `Behind` of a fake of host memory, with a stretch of 1000 bytes."""

    def __init__(self) -> None:
        self.host = HostTier()
        self.fake = FakeTier(self.host)
        self.tier = Behind(self.fake, 100, LATE)
        self.place = self.tier.allocate(1000)

    def hold(self, at: int = 900, data: bytes = b"held") -> None:
        """Have the writer stop in the middle of a write."""
        count = self.fake.writes
        self.fake.hang_writes.clear()
        self.write(at, data)
        wait_for(lambda: self.fake.writes > count)

    @contextmanager
    def impatient(self) -> Iterator[None]:
        """Have the deadline come soon, for what will not be done."""
        self.tier._queue.timeout = SOON
        yield
        self.tier._queue.timeout = LATE

    def write(self, at: int, data: bytes) -> None:
        self.tier.write(self.place + at, memoryview(data))

    def read(self, at: int, *sizes: int) -> bytes:
        buffers = [bytearray(size) for size in sizes]
        self.tier.read(self.place + at, [memoryview(buffer) for buffer in buffers])
        return b"".join(buffers)

    def close(self) -> None:
        self.fake.hang_writes.set()
        self.tier.close()


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def writers() -> int:
    return sum(thread.name == "attnpred-writer" for thread in threading.enumerate())


@pytest.fixture
def setup() -> Iterator[Setup]:
    setup = Setup()
    yield setup
    setup.close()
    assert writers() == 0


def test_no_thread_before_the_first_write(setup: Setup) -> None:
    assert writers() == 0
    setup.tier.flush()
    setup.tier.release(setup.place, 1000)
    assert writers() == 0


def test_queued_bytes_are_copied_and_can_be_read(setup: Setup) -> None:
    setup.hold()
    data = bytearray(b"abcdefgh")
    setup.tier.write(setup.place, memoryview(data))
    data[:] = b"XXXXXXXX"
    assert setup.tier.pending_bytes == 12
    assert setup.read(0, 8) == b"abcdefgh" and setup.read(2, 1, 0, 3) == b"cdef"
    assert setup.read(901, 2) == b"el"  # of the write that is under way
    assert setup.fake.reads == 0
    setup.fake.hang_writes.set()
    setup.tier.flush()
    assert setup.tier.pending_bytes == 0
    assert setup.read(0, 8) == b"abcdefgh" and setup.fake.reads == 1


def test_the_last_write_counts(setup: Setup) -> None:
    setup.hold()
    for data in b"first", b"other", b"third":
        setup.write(0, data)
    assert setup.read(0, 5) == b"third"
    setup.fake.hang_writes.set()
    for number in range(200):
        setup.write(0, number.to_bytes(5, "big"))
        assert setup.read(0, 5) == number.to_bytes(5, "big")
    setup.tier.flush()
    assert setup.read(0, 5) == (199).to_bytes(5, "big") and setup.fake.writes == 204


def test_other_bytes_are_read_meanwhile(setup: Setup) -> None:
    setup.write(0, b"abcd")
    setup.tier.flush()
    setup.hold(4)
    setup.write(8, b"efgh")
    assert setup.read(0, 4) == b"abcd" and setup.fake.reads == 1


def test_a_range_that_is_queued_in_part_waits_for_it(setup: Setup) -> None:
    setup.write(0, b"....")
    setup.tier.flush()
    setup.hold(4)
    setup.write(2, b"ab")
    with ThreadPoolExecutor(4) as pool:
        reads = [pool.submit(setup.read, *read) for read in ((0, 4), (1, 2), (3, 2), (2, 6))]
        time.sleep(SOON)
        assert not any(read.done() for read in reads)
        setup.fake.hang_writes.set()
        assert [read.result(10) for read in reads] == [b"..ab", b".a", b"bh", b"abheld"]


def test_what_takes_too_long_is_an_error(setup: Setup) -> None:
    setup.hold(0, b"x" * 90)
    calls: list[Callable[[], object]] = [
        lambda: setup.read(80, 20),
        lambda: setup.write(200, b"x" * 11),
        lambda: setup.tier.release(setup.place, 1000),
        setup.tier.flush,
    ]
    start = time.monotonic()
    for call in calls:
        with setup.impatient(), pytest.raises(StoreError, match=r"got 90 bytes still to write after 0.05 s"):
            call()
    assert time.monotonic() - start < LATE
    setup.write(200, b"x" * 10)  # fits
    setup.fake.hang_writes.set()
    setup.tier.flush()
    assert setup.read(0, 90) == b"x" * 90


def test_pieces_of_which_some_are_queued(setup: Setup) -> None:
    setup.write(0, b"abcdefgh")
    setup.tier.flush()
    setup.hold(4, b"EFGH")
    setup.write(20, b"ijkl")
    into = torch.zeros(3, 2, dtype=torch.uint8)
    setup.tier.read_many(setup.place + torch.tensor([1, 5, 20]), into)
    assert bytes(into.flatten().tolist()) == b"bcFGij"


def test_the_page_cache_is_dropped_after_the_queue_is_empty(setup: Setup) -> None:
    setup.hold()
    with setup.impatient(), pytest.raises(StoreError, match="still to write"):
        setup.tier.drop_page_cache()
    setup.fake.hang_writes.set()
    setup.tier.drop_page_cache()
    assert setup.tier.pending_bytes == 0


def test_room_for_the_next_write_is_waited_for(setup: Setup) -> None:
    setup.hold(0, b"a" * 60)
    setup.write(100, b"b" * 40)
    with ThreadPoolExecutor(1) as pool:
        write = pool.submit(setup.write, 200, b"c")
        time.sleep(SOON)
        assert not write.done() and setup.tier.pending_bytes == 100
        setup.fake.hang_writes.set()
        write.result(10)
    setup.tier.flush()
    assert (setup.read(59, 1), setup.read(100, 1), setup.read(200, 1)) == (b"a", b"b", b"c")


def test_a_write_over_the_limit_goes_alone(setup: Setup) -> None:
    setup.hold(0, b"a" * 500)
    with setup.impatient(), pytest.raises(StoreError, match="still to write"):
        setup.write(500, b"b")
    setup.fake.hang_writes.set()
    setup.tier.flush()
    setup.hold(0, b"a")
    with setup.impatient(), pytest.raises(StoreError, match="still to write"):
        setup.write(500, b"b" * 500)


# Failures


@pytest.mark.parametrize(
    "error", [StoreError("got a full disk"), OSError("got a full disk"), SystemExit("a full disk")]
)
def test_a_failed_write_is_heard_of_ever_after(setup: Setup, error: BaseException) -> None:
    setup.hold()
    setup.fake.fail_writes = [error]
    setup.write(0, b"abcd")
    setup.write(4, b"efgh")
    setup.fake.hang_writes.set()
    wait_for(lambda: setup.tier.pending_bytes == 0)
    calls: list[Callable[[], object]] = [
        setup.tier.flush,
        lambda: setup.read(0, 4),
        lambda: setup.write(0, b"abcd"),
        lambda: setup.tier.allocate(1),
        lambda: setup.tier.release(setup.place, 1000),
    ]
    for call in calls * 2:
        with pytest.raises(StoreError, match=rf"{type(error).__name__} from a write in the background.*a full disk"):
            call()
    assert setup.fake.writes == 2
    setup.tier.close()
    assert setup.tier.used() == {"host": 0}


def test_those_who_wait_hear_of_a_failure_at_once(setup: Setup) -> None:
    setup.fake.fail_writes = [OSError("broken")]
    setup.hold(0, b"x" * 90)
    with ThreadPoolExecutor(3) as pool:
        calls = [
            pool.submit(setup.tier.flush),
            pool.submit(setup.read, 80, 20),
            pool.submit(setup.write, 200, b"x" * 50),
        ]
        time.sleep(0.02)
        setup.fake.hang_writes.set()
        for call in calls:
            with pytest.raises(StoreError, match="broken"):
                call.result(5)


def test_a_thread_that_is_just_gone(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(behind, "work", lambda queue: None)
    with suppress(StoreError):  # gone already
        setup.write(0, b"abcd")
    wait_for(lambda: writers() == 0)
    start = time.monotonic()
    for call in (setup.tier.flush, lambda: setup.write(0, b"abcd"), lambda: setup.read(0, 4)):
        with pytest.raises(StoreError, match="got a writer thread that has ended"):
            call()
    assert time.monotonic() - start < LATE


def test_no_thread_to_be_had(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    def start(self: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", start)
    with pytest.raises(StoreError, match="got no writer thread"):
        setup.write(0, b"abcd")
    monkeypatch.undo()
    setup.write(0, b"abcd")
    assert setup.read(0, 4) == b"abcd"


def test_a_fork_has_no_writer(setup: Setup) -> None:
    setup.hold()

    def job() -> None:
        for call in (lambda: setup.read(900, 4), lambda: setup.write(0, b"abcd"), setup.tier.flush):
            with pytest.raises(StoreError, match="does not cross a fork"):
                call()
        setup.tier.close()

    with setup.tier._queue.changed:  # as it may be when the process is forked
        assert end_of(forked(job)) == 0
    setup.fake.hang_writes.set()
    setup.tier.flush()
    assert setup.read(900, 4) == b"held"


# The end


def test_released_bytes_are_not_written(setup: Setup) -> None:
    setup.hold()
    other = setup.tier.allocate(50)
    setup.tier.write(other, memoryview(b"unwanted"))
    setup.write(0, b"abcd")
    setup.tier.release(other, 50)
    assert setup.tier.pending_bytes == 8
    setup.fake.hang_writes.set()
    setup.tier.flush()
    assert setup.fake.writes == 2 and setup.read(0, 4) == b"abcd"


def test_release_waits_for_what_is_being_written(setup: Setup) -> None:
    setup.hold()
    with ThreadPoolExecutor(1) as pool:
        release = pool.submit(setup.tier.release, setup.place, 1000)
        time.sleep(SOON)
        assert not release.done() and setup.tier.used() == {"host": 1000}
        setup.fake.hang_writes.set()
        release.result(10)
    assert setup.tier.used() == {"host": 0}


def test_close_does_not_write_what_is_queued(setup: Setup) -> None:
    setup.hold()
    setup.write(0, b"abcd")
    with ThreadPoolExecutor(1) as pool:
        close = pool.submit(setup.tier.close)
        wait_for(lambda: setup.tier._queue.is_closed)
        setup.fake.hang_writes.set()
        close.result(10)
    assert setup.fake.writes == 1 and setup.tier.pending_bytes == 0 and setup.tier.used() == {"host": 0}


def test_close_ends_the_waiting_of_others(setup: Setup) -> None:
    setup.hold()
    with ThreadPoolExecutor(2) as pool:
        flush = pool.submit(setup.tier.flush)
        time.sleep(0.02)
        close = pool.submit(setup.tier.close)
        with pytest.raises(StoreError, match="close"):
            flush.result(10)
        setup.fake.hang_writes.set()
        close.result(10)


def test_close_does_not_wait_for_ever(setup: Setup) -> None:
    setup.hold()
    with setup.impatient():
        setup.tier.close()
    assert setup.tier.used() == {"host": 0}
    setup.fake.hang_writes.set()
    wait_for(lambda: writers() == 0)


@pytest.mark.parametrize("error", [None, OSError("broken")])
def test_the_last_reference_ends_it(error: BaseException | None) -> None:
    gc.disable()
    try:
        setup = Setup()
        host, fake = setup.host, weakref.ref(setup.fake)
        setup.fake.fail_writes = [error]
        setup.write(0, b"abcd")
        while setup.tier.pending_bytes:
            time.sleep(0.001)
        del setup
        assert host.used() == {"host": 0} and writers() == 0 and fake() is None
    finally:
        gc.enable()


def test_collected_by_its_own_writer(monkeypatch: pytest.MonkeyPatch) -> None:
    """As part of a cycle it may be: then there is nobody to wait for."""
    setup = Setup()
    host, go, write = setup.host, threading.Event(), setup.host.write

    def late(place: int, data: memoryview) -> None:
        go.wait()
        gc.collect()
        write(place, data)  # still open

    monkeypatch.setattr(host, "write", late)
    setup.cycle = setup  # type: ignore[attr-defined]
    setup.write(0, b"abcd")
    while not setup.fake.writes:
        time.sleep(0.001)
    del setup
    go.set()
    wait_for(lambda: writers() == 0)
    assert host.used() == {"host": 0}
