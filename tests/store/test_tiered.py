"""`TieredStore` gives the bits of `BlockPool`, whatever the order of operations, the tier below and the timing."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from attnpred.store.backing import Backing
from attnpred.store.behind import Behind
from attnpred.store.chain import Chain
from attnpred.store.disk import DiskTier
from attnpred.store.fake import FakeTier
from attnpred.store.host import HostTier
from attnpred.store.pool import BlockPool
from attnpred.store.tier import Tier
from attnpred.store.tiered import TieredStore
from attnpred.telemetry import LayerCounts

P, HEADS, DIM, VALUE_DIM, SLOTS = 4, 2, 8, 6, 7

BACKINGS: dict[str, Callable[[Path], Tier]] = {
    "host": lambda folder: HostTier(),
    "disk": lambda folder: DiskTier(folder),
    "behind": lambda folder: Behind(DiskTier(folder), 4096, 5.0),
    "chain": lambda folder: Chain((HostTier(1 << 20), DiskTier(folder))),
    "slow": lambda folder: delayed(0.0002),
}


def delayed(seconds: float) -> FakeTier:
    fake = FakeTier(HostTier())
    fake.delay = seconds
    return fake


def tiered(tier: Tier, slots: int = SLOTS, codec: str | None = None) -> TieredStore:
    return TieredStore(P, lambda tokens: slots, Backing(tier, codec, 5.0), LayerCounts())


def tokens(count: int, batch: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.randn(batch, HEADS, count, DIM, generator=generator),
        torch.randn(batch, HEADS, count, VALUE_DIM, generator=generator),
    )


def attended(store: TieredStore | BlockPool, selection: torch.Tensor) -> list[torch.Tensor]:
    """What the sparse kernel would read: the tokens of the selected blocks, as far as they exist."""
    keys, values, slots = store.wait(selection)
    parts = []
    for stored in (keys, values):
        blocks = stored.unflatten(2, (-1, P))
        index = slots.clamp_min(0)[..., None, None].expand(-1, -1, -1, P, stored.shape[3])
        found = blocks.gather(2, index)
        exists = (selection[..., None] * P + torch.arange(P) < store.length) & (selection >= 0)[..., None]
        parts.append(found.masked_fill(~exists[..., None], 0.0))
    return parts


def assert_same(store: TieredStore, pool: BlockPool) -> None:
    assert store.length == pool.length
    for got, want in zip(store.view(), pool.view(), strict=True):
        assert torch.equal(got, want)
    starts = [piece.start for piece in store.pieces()]
    assert starts == [piece.start for piece in pool.pieces()]


OPERATIONS = st.lists(
    st.one_of(
        st.tuples(st.just("append"), st.integers(1, 30)),
        st.tuples(st.just("append"), st.just(1)),
        st.tuples(st.just("attend"), st.integers(0, 999)),
        st.tuples(st.just("request"), st.integers(0, 999)),
        st.tuples(st.just("crop"), st.integers(1, 12)),
        st.tuples(st.just("beams"), st.integers(0, 99)),
        st.tuples(st.just("fork"), st.just(0)),
        st.tuples(st.just("clear"), st.just(0)),
    ),
    min_size=4,
    max_size=14,
)


@pytest.mark.parametrize("name", BACKINGS)
@settings(max_examples=25, deadline=None)
@given(operations=OPERATIONS, batch=st.integers(1, 3), piece=st.sampled_from([8, 20, 2048]))
def test_any_sequence_of_operations_gives_the_bits_of_the_pool(
    name: str, operations: list[tuple[str, int]], batch: int, piece: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    tier = BACKINGS[name](tmp_path_factory.mktemp("tier"))
    store, pool = tiered(tier), BlockPool(P)
    elder: list[tuple[TieredStore, BlockPool]] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("attnpred.store.base.PIECE_TOKENS", piece)
        for step, (operation, value) in enumerate([("append", 40), *operations]):
            current = pool.keys.shape[0] if pool.length else batch
            blocks = -(-pool.length // P)
            if operation == "append" or pool.length == 0:
                keys, values = tokens(value or 1, current, step)
                store.append(keys, values)
                pool.append(keys, values)
            elif operation in ("attend", "request"):
                generator = torch.Generator().manual_seed(value)
                size = min(SLOTS, blocks)
                selection = torch.rand(current, HEADS, blocks + 1, generator=generator).argsort(-1)[..., :size]
                if operation == "request":
                    store.request(selection)  # may name the block that comes next
                else:
                    selection = selection.masked_fill(selection >= blocks, -1)
                    for got, want in zip(attended(store, selection), attended(pool, selection), strict=True):
                        assert torch.equal(got, want)
            elif operation == "crop":
                store.crop(pool.length - value if pool.length > value else 1)
                pool.crop(pool.length - value if pool.length > value else 1)
            elif operation == "beams":
                rows = torch.randint(0, current, (batch,), generator=torch.Generator().manual_seed(value))
                store.select(rows)
                pool.select(rows)
            elif operation == "fork":
                elder.append((store, pool))
                store, pool = store.fork(LayerCounts()), pool.fork()
            elif operation == "clear":
                store.clear()
                pool.clear()
        for pair in [*elder, (store, pool)]:
            if pair[1].length:
                assert_same(*pair)
    tier.close()


def filled(length: int = 200, slots: int = SLOTS, codec: str | None = None) -> tuple[TieredStore, FakeTier]:
    fake = FakeTier(HostTier())
    store = tiered(fake, slots, codec)
    store.append(*tokens(length, 1, 0))
    return store, fake


def selection_of(*blocks: int) -> torch.Tensor:
    return torch.tensor(blocks).expand(1, HEADS, -1)


def test_only_misses_move() -> None:
    store, _ = filled()
    unit = P * (DIM + VALUE_DIM) * 4
    store.wait(selection_of(0, 1, 2, 3))
    assert store.counts.bytes_fetched == 4 * HEADS * unit
    store.request(selection_of(1, 2, 3, 9))
    store.wait(selection_of(1, 2, 3, 9))
    assert store.counts.bytes_fetched == 5 * HEADS * unit
    assert (store.counts.selected, store.counts.fetched_late) == (8 * HEADS, 4 * HEADS)
    assert store.counts.hits + store.counts.arrived_late == 4 * HEADS


def test_the_least_recently_selected_block_is_evicted() -> None:
    store, _ = filled(slots=5)
    for blocks in ((0, 1, 2), (3, 4), (1, 2), (5, 6)):  # 0 is the oldest, then 3 and 4, when 5 and 6 come
        store.wait(selection_of(*blocks))
    fetched = store.counts.bytes_fetched
    store.wait(selection_of(1, 2, 5, 6))
    assert store.counts.bytes_fetched == fetched
    store.wait(selection_of(0))
    assert store.counts.bytes_fetched > fetched


def test_fast_memory_holds_the_slots_and_no_more() -> None:
    store, _ = filled(length=4000)
    for step in range(50):
        store.request(selection_of(*range(step, step + SLOTS)))
        store.append(*tokens(1, 1, step))
        store.wait(selection_of(*range(step, step + SLOTS)))
    assert store.keys.shape[2] == (SLOTS + 1) * P  # the open block, or the next one, is not among them
    pool = HEADS * (SLOTS + 1) * P * (DIM + VALUE_DIM) * 4
    assert store.fast_bytes() - pool < 0.3 * store.bytes()  # tables: units here are tiny


def test_what_fits_the_slots_is_not_written() -> None:
    store, fake = filled(length=SLOTS * P)
    assert fake.writes == 0 and store.sealed is None
    store.append(*tokens(1, 1, 1))
    assert fake.writes > 0


def test_a_layer_that_outgrows_its_slots_gives_them_back() -> None:
    """A layer that stays dense holds everything while that fits the budget, and two blocks afterwards."""
    pool, wanted = BlockPool(P), {10: 10}
    store = TieredStore(
        P, lambda length: wanted.get(-(-length // P), 10 if length <= 40 else 2), Backing(HostTier()), LayerCounts()
    )
    for step in range(60):
        keys, values = tokens(1, 2, step)
        store.append(keys, values)
        pool.append(keys, values)
        assert_same(store, pool)
    assert store.keys.shape[2] == 2 * P


def test_a_wrong_byte_is_read_again_and_then_an_error() -> None:
    store, fake = filled()
    pool = BlockPool(P)
    pool.append(*tokens(200, 1, 0))
    fake.corrupt_next = 1
    for got, want in zip(attended(store, selection_of(5)), attended(pool, selection_of(5)), strict=True):
        assert torch.equal(got, want)
    assert store.counts.retries >= 1
    fake.corrupt_next = 99
    with pytest.raises(Exception, match=r"layer 0, block 7: got other bytes from .* than were written there"):
        store.wait(selection_of(7))
    with pytest.raises(Exception, match=r"layer 0, block \d+: got other bytes"):
        store.view()


@pytest.mark.parametrize("codec", ["int8", "fp8"])
def test_a_lossy_block_has_one_value_wherever_it_lies(codec: str) -> None:
    store, _ = filled(codec=codec)
    for step in range(40):
        store.append(*tokens(1, 1, 100 + step))
    everything = store.view()
    for first in range(0, 60, SLOTS):
        ids = [block for block in range(first, first + SLOTS) if block < 60]
        for got, stored in zip(attended(store, selection_of(*ids)), everything, strict=True):
            want = stored.unflatten(2, (-1, P))[:, :, ids]
            assert torch.equal(got, want)
    exact, _ = filled()
    error = (everything[0][:, :, :200] - exact.view()[0]).norm() / exact.view()[0].norm()
    assert 0 < error < 0.05


def test_a_fork_shares_and_a_crop_of_one_leaves_the_other() -> None:
    store, fake = filled()
    written = fake.writes
    other = store.fork(LayerCounts())
    assert fake.writes == written
    before = other.view()
    store.crop(101)
    store.append(*tokens(300, 1, 9))
    for got, want in zip(other.view(), before, strict=True):
        assert torch.equal(got, want)
