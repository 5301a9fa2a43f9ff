"""Every tier gives back what a dictionary of bytes would, whatever is asked of it, and leaves nothing behind."""

import gc
import random
import time
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from attnpred.errors import StoreError, TierFullError
from attnpred.store import TIERS, positioned
from attnpred.store.behind import Behind
from attnpred.store.chain import Chain
from attnpred.store.disk import DiskTier
from attnpred.store.fake import FakeTier
from attnpred.store.host import HostTier
from attnpred.store.tier import Tier, buffer

LIMIT = 1 << 16

MAKERS: dict[str, Callable[[Path], Tier]] = {  # each with room for LIMIT bytes
    "host": lambda folder: HostTier(LIMIT),
    "disk": lambda folder: DiskTier(folder, LIMIT),
    "chain": lambda folder: Chain([HostTier(LIMIT // 2), DiskTier(folder, LIMIT // 2)]),
    "behind": lambda folder: Behind(DiskTier(folder, LIMIT), limit=300, timeout=10.0),
    "fake": lambda folder: FakeTier(HostTier(LIMIT)),
}

OPERATIONS = st.lists(
    st.one_of(
        st.tuples(st.just("allocate"), st.sampled_from([1, 64, 64, 500, 3000]), st.just(0), st.just(0)),
        st.tuples(st.sampled_from(["write", "read", "read"]), *[st.integers(0, 9999)] * 3),
        st.tuples(st.just("release"), *[st.integers(0, 9999)] * 3),
        st.tuples(st.just("flush"), *[st.just(0)] * 3),
    ),
    min_size=1,
    max_size=40,
)


@pytest.fixture(params=TIERS)
def tier(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Tier]:
    tier = MAKERS[request.param](tmp_path)
    yield tier
    tier.close()


def test_every_tier_has_a_maker() -> None:
    assert {name: type(make(Path("never made"))) for name, make in MAKERS.items()} == TIERS


def read(tier: Tier, place: int, *sizes: int) -> bytes:
    """Read into buffers of `sizes`."""
    buffers = [bytearray(size) for size in sizes]
    tier.read(place, [memoryview(buffer) for buffer in buffers])
    return b"".join(buffers)


def filled(tier: Tier, data: bytes) -> int:
    """Return the place of a new stretch with `data` in it."""
    place = tier.allocate(len(data))
    tier.write(place, memoryview(data))
    return place


@pytest.mark.parametrize("name", TIERS)
@given(operations=OPERATIONS, seed=st.integers(0, 99))
@settings(max_examples=40, deadline=None, derandomize=True)
def test_equals_a_dictionary_of_bytes(
    name: str, operations: list[tuple[str, int, int, int]], seed: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    generator = random.Random(seed)
    tier = MAKERS[name](tmp_path_factory.mktemp("tier"))
    known: dict[int, bytearray] = {}
    for verb, which, first, length in operations:
        if verb == "allocate":
            data = generator.randbytes(which)
            place = filled(tier, data)
            assert all(place + which <= other or other + len(old) <= place for other, old in known.items())
            known[place] = bytearray(data)
        elif verb == "flush":
            tier.flush()
        elif known:
            place = list(known)[which % len(known)]
            size = len(known[place])
            first %= size
            length = length % (size - first) + 1
            if verb == "write":
                data = generator.randbytes(length)
                tier.write(place + first, memoryview(data))
                known[place][first : first + length] = data
            elif verb == "read":
                cut = generator.randrange(length + 1)
                expected = known[place][first : first + length]
                assert read(tier, place + first, cut, 0, length - cut) == expected
            else:
                tier.release(place, size)
                del known[place]
        assert sum(tier.used().values()) == sum(map(len, known.values()))
    assert {place: read(tier, place, len(data)) for place, data in known.items()} == known
    tier.close()


def test_reads_into_more_buffers_than_one_system_call_takes(tier: Tier) -> None:
    data = random.Random(0).randbytes(5000)
    place = filled(tier, data)
    tier.flush()
    assert read(tier, place + 7, *[1, 2, 0] * 1500) == data[7:4507]


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("count", [2, 20, 600])
def test_many_pieces_at_once(tier: Tier, count: int, native: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not native:
        monkeypatch.setattr(positioned, "_HAS_NUMBA", False)
    generator = random.Random(count)
    stretches = [generator.randbytes(12000) for _ in range(4)]
    places = sorted((filled(tier, data), data) for data in stretches)
    size = 60  # of 4 * 200 pieces; some of those asked for lie side by side, some far from each other
    pieces = sorted({0, 799, *generator.sample(range(1, 799), count - 2)})
    starts = [places[piece // 200][0] + piece % 200 * size for piece in pieces]
    expected = [places[piece // 200][1][piece % 200 * size :][:size] for piece in pieces]
    for _ in range(2):  # still queued, perhaps, and surely not
        into = torch.zeros(count, size, dtype=torch.uint8)
        tier.read_many(torch.tensor(starts), into)
        assert [bytes(row.tolist()) for row in into] == expected
        tier.flush()
    tier.read_many(torch.empty(0, dtype=torch.int64), torch.empty(0, size, dtype=torch.uint8))


def test_dropping_the_page_cache_changes_nothing(tier: Tier) -> None:
    tier.drop_page_cache()
    place = filled(tier, b"abc" * 5000)
    tier.drop_page_cache()
    assert read(tier, place, 15000) == b"abc" * 5000


def test_memory_of_tensors_goes_in_and_out(tier: Tier) -> None:
    there, back = torch.arange(300, dtype=torch.float32), torch.zeros(300)
    place = tier.allocate(1200)
    tier.write(place, buffer(there))
    tier.read(place, [buffer(back[:100]), buffer(back[100:])])
    assert torch.equal(back, there)


def test_many_threads_read_while_one_writes_elsewhere(tier: Tier) -> None:
    data = random.Random(1).randbytes(5000)
    place, other = filled(tier, data), tier.allocate(3000)

    def job(seed: int) -> bool:
        generator = random.Random(seed)
        starts = [generator.randrange(4000) for _ in range(100)]
        return all(read(tier, place + at, 300, 700) == data[at : at + 1000] for at in starts)

    with ThreadPoolExecutor(8) as pool:
        jobs = [pool.submit(job, seed) for seed in range(8)]
        for number in range(50):
            tier.write(other, memoryview(bytes([number]) * 3000))
            tier.release(filled(tier, b"x" * 100), 100)
        assert all(job.result(30) for job in jobs)
    assert read(tier, other, 3000) == bytes([49]) * 3000


def test_limit(tier: Tier) -> None:
    places = [tier.allocate(LIMIT // 4) for _ in range(4)]
    with pytest.raises(TierFullError, match=f"got {LIMIT // 4} bytes .* raise its limit") as caught:
        tier.allocate(LIMIT // 4)
    assert "\n" not in str(caught.value)
    assert sum(tier.used().values()) == LIMIT
    tier.release(places[1], LIMIT // 4)
    place = filled(tier, b"again" + bytes(LIMIT // 4 - 5))
    assert read(tier, place, 5) == b"again"


def test_too_much_leaves_nothing(tier: Tier, tmp_path: Path) -> None:
    with pytest.raises(TierFullError):
        tier.allocate(LIMIT + 1)
    assert sum(tier.used().values()) == 0 and list(tmp_path.iterdir()) == []


def test_close_twice(tier: Tier, tmp_path: Path) -> None:
    places = [filled(tier, b"abc" * 5000) for _ in range(3)]
    tier.close()
    tier.close()
    assert sum(tier.used().values()) == 0 and list(tmp_path.iterdir()) == []
    for place in places:
        with pytest.raises(StoreError):
            read(tier, place, 3)
        with pytest.raises(StoreError):
            tier.write(place, memoryview(b"abc"))


@pytest.mark.parametrize("name", TIERS)
def test_collected_without_the_help_of_gc(name: str, tmp_path: Path) -> None:
    tier = MAKERS[name](tmp_path)
    for _ in range(3):
        filled(tier, b"abc" * 5000)
    gone = weakref.ref(tier)
    gc.disable()
    try:
        del tier
        assert gone() is None and list(tmp_path.iterdir()) == []
    finally:
        gc.enable()


def test_has_a_name_for_errors(tier: Tier) -> None:
    tier.allocate(1)
    assert tier.describe() and "\n" not in tier.describe()


# What is special about those that have no file of tests


def test_host_places_are_never_used_twice() -> None:
    tier = HostTier()
    old = filled(tier, b"old")
    tier.release(old, 3)
    new = filled(tier, b"new")
    assert new != old
    for place, size in (old, 3), (new, 4), (new + 1, 3), (-1, 1):
        with pytest.raises(StoreError, match="of host memory"):
            read(tier, place, size)


def test_host_without_memory_is_full(monkeypatch: pytest.MonkeyPatch) -> None:
    def empty(*_: object, **__: object) -> None:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    tier = HostTier()
    monkeypatch.setattr(torch, "empty", empty)
    with pytest.raises(TierFullError, match="got no 70 bytes of host memory"):
        tier.allocate(70)
    assert tier.used() == {"host": 0}


def test_pinned_memory_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[bool] = []
    empty = torch.empty

    def asking(size: int, dtype: torch.dtype, pin_memory: bool, device: str) -> torch.Tensor:
        asked.append(pin_memory)
        return empty(size, dtype=dtype, device=device)

    monkeypatch.setattr(torch, "empty", asking)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    tier = HostTier(pin=True)
    assert read(tier, filled(tier, b"abc"), 3) == b"abc" and asked == [True]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(StoreError, match="got pin=True, expected a GPU"):
        HostTier(pin=True)


def test_chain_takes_the_first_with_room(tmp_path: Path) -> None:
    host, disk = HostTier(100), DiskTier(tmp_path, 200)
    tier = Chain([host, disk, HostTier(10)])
    places = [filled(tier, bytes([number]) * 60) for number in range(4)]
    assert (host.used(), disk.used()) == ({"host": 60}, {"disk": 180})
    assert tier.used() == {"host": 60, "disk": 180}
    assert [read(tier, place + 59, 1)[0] for place in places] == [0, 1, 2, 3]
    tier.release(places[0], 60)
    assert tier.used() == {"host": 0, "disk": 180}
    with pytest.raises(TierFullError, match=r"host memory .* of 100 .*\.kv .* of 200 .* host memory .* of 10 "):
        tier.allocate(150)
    with pytest.raises(TierFullError, match="no tiers"):
        Chain([]).allocate(1)
    tier.close()


def test_chain_passes_other_errors_on(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    tier = Chain([DiskTier(tmp_path / "file"), HostTier()])
    with pytest.raises(StoreError) as caught:
        tier.allocate(1)
    assert not isinstance(caught.value, TierFullError)


def test_chain_closes_all_whatever_one_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def close(self: FakeTier) -> None:
        raise StoreError("got a test")

    host = HostTier(100)
    tier = Chain([host, FakeTier(HostTier())])
    tier.allocate(100)
    monkeypatch.setattr(FakeTier, "close", close)
    with pytest.raises(StoreError, match="got a test"):
        tier.close()
    assert host.used() == {"host": 0}


def test_fake_keeps_to_its_script() -> None:
    tier = FakeTier(HostTier())
    place = filled(tier, b"abcd")
    tier.fail_reads = [None, OSError("later")]
    assert read(tier, place, 4) == b"abcd"
    with pytest.raises(OSError, match="later"):
        read(tier, place, 4)
    tier.corrupt_next = 1
    assert read(tier, place, 0, 4) == bytes([ord("a") ^ 0xFF]) + b"bcd"
    assert read(tier, place, 4) == b"abcd"
    tier.fail_writes = [StoreError("now")]
    with pytest.raises(StoreError, match="now"):
        tier.write(place, memoryview(b"zzzz"))
    assert read(tier, place, 4) == b"abcd"
    assert (tier.reads, tier.writes, tier.bytes_read) == (5, 2, 20)


def test_fake_hangs_and_is_late() -> None:
    tier = FakeTier(HostTier())
    place = filled(tier, b"abcd")
    tier.hang.clear()
    tier.hang_writes.clear()
    with ThreadPoolExecutor(2) as pool:
        reading = pool.submit(read, tier, place, 4)
        writing = pool.submit(tier.write, place, memoryview(b"efgh"))
        is_done = [wait([call], 0.02).done for call in (reading, writing)]
        tier.hang.set()
        first = reading.result(10) if not is_done[0] else b""
        is_done.append(wait([writing], 0.02).done)
        tier.hang_writes.set()
    assert not any(is_done) and first == b"abcd" and read(tier, place, 4) == b"efgh"
    tier.delay = 0.05
    start = time.monotonic()
    read(tier, place, 4)
    assert time.monotonic() - start >= 0.05
