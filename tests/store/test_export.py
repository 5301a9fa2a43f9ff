"""What a store exports, written to a file and adopted by another, is the same store, and the file is never written."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from attnpred.errors import StoreError
from attnpred.store.backing import Backing
from attnpred.store.base import Store
from attnpred.store.chain import Chain
from attnpred.store.codec import checks
from attnpred.store.host import HostTier
from attnpred.store.pool import BlockPool
from attnpred.store.safetensors_file import Entry, SafetensorsFile, write
from attnpred.store.saved import SavedTier
from attnpred.store.sealed import SealedBlocks
from attnpred.store.tiered import TieredStore
from attnpred.telemetry import LayerCounts

P, HEADS, DIM, VALUE_DIM, SLOTS = 4, 2, 8, 6, 7


def tokens(count: int, batch: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.randn(batch, HEADS, count, DIM, generator=generator),
        torch.randn(batch, HEADS, count, VALUE_DIM, generator=generator),
    )


def tiered(backing: Backing) -> TieredStore:
    return TieredStore(P, lambda length: SLOTS, backing, LayerCounts(), 3)


def saved(store: Store, path: Path) -> tuple[Tensor, Tensor, Tensor]:
    """Write the units of `store`; return their checks, and the open keys and values."""
    export = store.export()
    shape = (store.batch, store.length // P, HEADS)
    pieces = list(export.units)
    write(path, [Entry("units", torch.uint8, (*shape, export.unit_bytes), pieces)], {})
    seals = torch.cat([checks(piece) for piece in pieces]) if pieces else torch.empty(0, dtype=torch.int32)
    return seals.view(shape), export.keys.clone(), export.values.clone()


def adopted(kind: str, path: Path, said: tuple[Tensor, Tensor, Tensor]) -> Store:
    file, (seals, keys, values) = SafetensorsFile(path), said
    tier = SavedTier(file)
    backing = Backing(tier if kind == "pool" else Chain((tier, HostTier())), None, 5.0)
    store: Store = BlockPool(P) if kind == "pool" else tiered(backing)
    store.adopt(SealedBlocks.adopt(backing, P, keys, values, 3, file.place("units"), seals), keys, values)
    return store


OPERATIONS: dict[str, Callable[[Store, int], object]] = {
    "append": lambda store, value: store.append(*tokens(value, store.batch, value)),
    "crop": lambda store, value: store.crop(max(1, store.length - value)),
    "beams": lambda store, value: store.select(torch.tensor([value % store.batch, 0])),
    "wait": lambda store, value: store.wait(torch.full((store.batch, HEADS, 1), value % (store.length // P or 1))),
    "repeat": lambda store, value: store.repeat(1 + value % 2) if store.batch < 4 else None,
}


@pytest.mark.parametrize("kind", ["pool", "tiered"])
@settings(max_examples=20, deadline=None, derandomize=True)
@given(
    length=st.integers(1, 70),
    batch=st.integers(1, 2),
    operations=st.lists(st.tuples(st.sampled_from([*OPERATIONS]), st.integers(1, 40)), max_size=8),
)
def test_it_goes_on_as_the_other(
    kind: str, length: int, batch: int, operations: list[tuple[str, int]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("saved") / "a"
    pool = BlockPool(P)
    pool.append(*tokens(length, batch, 0))
    other = tiered(Backing(HostTier(), None, 5.0))
    other.append(*tokens(length, batch, 0))
    said = saved(other, path)
    assert all(map(torch.equal, said, saved(pool, path)))  # wherever its blocks lie
    store, whole = adopted(kind, path, said), path.read_bytes()
    assert (store.length, store.batch, store.heads) == (length, batch, HEADS)
    for name, value in operations:
        for one in (store, pool):
            OPERATIONS[name](one, value)
    assert store.length == pool.length
    assert all(map(torch.equal, store.view(), pool.view()))
    again = adopted(kind, path, saved(store, path))  # what lay in the file, which is another by now, and what did not
    assert all(map(torch.equal, again.view(), pool.view()))
    assert whole[:8] == path.read_bytes()[:8]


@pytest.mark.parametrize("codec", ["int8", "fp8"])
def test_rounded_units_are_copied_as_they_lie(codec: str, tmp_path: Path) -> None:
    store = tiered(Backing(HostTier(), codec, 5.0))
    store.append(*tokens(101, 2, 0))
    assert store.sealed is not None
    seals, _, _ = saved(store, tmp_path / "a")
    assert torch.equal(seals, store.sealed.records.checks[store.sealed.ids])


def test_units_come_in_pieces(tmp_path: Path) -> None:
    pool, store = BlockPool(P), tiered(Backing(HostTier(), None, 5.0))
    for one in (pool, store):
        one.append(*tokens(40_000, 1, 0))
    for one in (pool, store):
        sizes = [piece.numel() for piece in one.export().units]
        assert len(sizes) > 3 and max(sizes) <= 1 << 20 and sum(sizes) == 40_000 * HEADS * (DIM + VALUE_DIM) * 4


def test_a_changed_block_is_named_and_tried_again(tmp_path: Path) -> None:
    pool = BlockPool(P)
    pool.append(*tokens(50, 1, 0))
    said = saved(pool, tmp_path / "a")
    whole = bytearray((tmp_path / "a").read_bytes())
    place = SafetensorsFile(tmp_path / "a").place("units") + (5 * HEADS + 1) * P * (DIM + VALUE_DIM) * 4 + 17
    whole[place] ^= 8
    (tmp_path / "a").write_bytes(whole)
    damaged = [adopted(kind, tmp_path / "a", said) for kind in ("pool", "tiered")]
    for store in damaged:
        for _ in range(2):
            with pytest.raises(StoreError, match=f"layer 3, block 5: got other bytes from {tmp_path}/a"):
                store.view()
    whole[place] ^= 8
    (tmp_path / "a").write_bytes(whole)
    for store in damaged:
        assert all(map(torch.equal, store.view(), pool.view()))


def test_a_fork_of_a_pool_that_was_not_read(tmp_path: Path) -> None:
    pool = BlockPool(P)
    pool.append(*tokens(50, 1, 0))
    first = adopted("pool", tmp_path / "a", saved(pool, tmp_path / "a"))
    assert isinstance(first, BlockPool)
    second = first.fork()
    second.crop(30)
    assert first.fast_bytes() == second.fast_bytes() == 0
    for store, length in ((second, 30), (first, 50)):
        store.append(*tokens(9, 1, 1))
        for got, want, new in zip(store.view(), pool.view(), tokens(9, 1, 1), strict=True):
            assert torch.equal(got, torch.cat((want[:, :, :length], new), 2))


def test_blocks_are_in_order_wherever_they_lie(tmp_path: Path) -> None:
    """Later blocks may have taken the places of earlier ones that others gave back."""
    pool, store = BlockPool(P), tiered(Backing(HostTier(), None, 5.0))
    for one in (pool, store):
        one.append(*tokens(160, 2, 0))
    other = store.fork(LayerCounts())
    for one in (pool, store):
        one.crop(80)
        one.append(*tokens(40, 2, 1))
    other.clear()
    for one in (pool, store):
        one.append(*tokens(80, 2, 2))
    assert store.sealed is not None
    places = store.sealed.records.address[store.sealed.ids[0]]
    assert not bool((places[1:] > places[:-1]).all())
    assert all(map(torch.equal, saved(store, tmp_path / "a"), saved(pool, tmp_path / "b")))
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
