"""`EvictingPool` gives what is left, bit by bit, as a dictionary of blocks would, whatever the order of operations."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from attnpred.errors import StoreError
from attnpred.store.evicting import EvictingPool
from attnpred.store.pool import SPARE

HEADS = 2
OPERATIONS = st.lists(
    st.one_of(
        st.tuples(st.just("append"), st.integers(1, 30)),
        st.tuples(st.just("release"), st.integers(0, 9)),
        st.tuples(st.just("release"), st.integers(0, 9)),
        st.tuples(st.just("crop"), st.integers(0, 12)),
        st.tuples(st.just("select"), st.lists(st.integers(0, 9), min_size=1, max_size=3)),
        st.tuples(st.just("repeat"), st.integers(1, 2)),
        st.tuples(st.just("fork"), st.none()),
    ),
    min_size=1,
    max_size=14,
)


class Naive:
    """Everything that ever came, and for each row and head the set of blocks that are left."""

    def __init__(self, block: int, rows: int) -> None:
        self.block = block
        self.keys, self.values = torch.zeros(rows, HEADS, 0, 3), torch.zeros(rows, HEADS, 0, 5)
        self.left: list[list[set[int]]] = [[set() for _ in range(HEADS)] for _ in range(rows)]

    @property
    def blocks(self) -> int:
        return -(-self.keys.shape[2] // self.block)

    def append(self, keys: Tensor, values: Tensor) -> None:
        before = self.blocks
        self.keys, self.values = torch.cat((self.keys, keys), 2), torch.cat((self.values, values), 2)
        for row in self.left:
            for head in row:
                head |= set(range(before, self.blocks))

    def kept(self, size: int, random: torch.Generator) -> Tensor:
        """Return a random choice of what is left, with the newest block, and some that was lost long ago."""
        chosen = torch.full((len(self.left), HEADS, size + 2), -1)
        for b, row in enumerate(self.left):
            for h, left in enumerate(row):
                order = torch.randperm(self.blocks, generator=random)[:size].tolist()
                chosen[b, h, : len(order)] = torch.tensor(order, dtype=torch.int64)
                chosen[b, h, size] = self.blocks - 1 if self.blocks - 1 not in order else -1
                row[h] = left & ({*order, self.blocks - 1})
        chosen[..., -1] = self.blocks  # which will come next
        return chosen

    def index(self, rows: Tensor) -> None:
        self.keys, self.values = self.keys[rows], self.values[rows]
        self.left = [copy.deepcopy(self.left[row]) for row in rows.tolist()]

    def assert_same(self, store: EvictingPool) -> None:
        size, length = self.block, self.keys.shape[2]
        assert store.length == length
        most = max(len(head) for row in self.left for head in row)
        ids = torch.full((len(self.left), HEADS, max(1, most)), -1)
        for b, row in enumerate(self.left):
            for h, left in enumerate(row):
                ids[b, h, : len(left)] = torch.tensor(sorted(left), dtype=torch.int64)
        found = store.wait(ids)
        for b, row in enumerate(self.left):
            for h, left in enumerate(row):
                for k, block in enumerate(sorted(left)):
                    slot, tokens = int(found.slots[b, h, k]), min(size, length - block * size)
                    for stored, want in ((found.keys, self.keys), (found.values, self.values)):
                        got = stored[b, h, slot * size : slot * size + tokens]
                        assert torch.equal(got, want[b, h, block * size : block * size + tokens])
        assert found.keys.isfinite().all() and found.values.isfinite().all() and found.keys.shape[2] % size == 0


@given(operations=OPERATIONS, block=st.sampled_from([1, 4]), seed=st.integers(0, 99))
@settings(max_examples=150, deadline=None, derandomize=True)
def test_equals_a_dictionary(operations: list[tuple[str, object]], block: int, seed: int) -> None:
    random = torch.Generator().manual_seed(seed)
    naive, store = Naive(block, 2), EvictingPool(block)
    for name, argument in [("append", 50), ("release", 6), *operations]:
        rows, length = len(naive.left), naive.keys.shape[2]
        if name == "append":
            new = torch.randn(rows, HEADS, argument, 3, generator=random), torch.randn(rows, HEADS, argument, 5)
            naive.append(*new)
            store.append(*new)
        elif name == "release":
            store.release(naive.kept(min(argument, naive.blocks), random))
        elif name == "crop":
            wanted = max(0, length - argument)
            blocks = -(-wanted // block)
            if wanted < length and not all(blocks - 1 in head for row in naive.left for head in row):
                with pytest.raises(StoreError, match=f"got a crop to {wanted} tokens"):
                    store.crop(wanted)
            else:
                store.crop(wanted)
                naive.keys, naive.values = naive.keys[:, :, :wanted], naive.values[:, :, :wanted]
                naive.left = [[{i for i in head if i < blocks} for head in row] for row in naive.left]
        elif name == "select":
            index = torch.tensor(argument) % rows
            store.select(index)
            naive.index(index)
        elif name == "repeat" and rows * argument <= 4:
            store.repeat(argument)
            naive.index(torch.arange(rows).repeat_interleave(argument))
        elif name == "fork":
            other, store = store, copy.deepcopy(store)
            other.append(torch.zeros(rows, HEADS, 3, 3), torch.zeros(rows, HEADS, 3, 5))
            other.release(torch.full((rows, HEADS, 1), (other.length - 1) // block))
        naive.assert_same(store)


def filled(tokens: int = 400, block: int = 4) -> EvictingPool:
    store = EvictingPool(block)
    store.append(torch.randn(1, HEADS, tokens, 8), torch.randn(1, HEADS, tokens, 8))
    return store


def test_bytes_fall_at_once_and_stay_low() -> None:
    store, token = filled(), HEADS * 16 * 4
    before = store.fast_bytes()
    store.release(torch.tensor([[[0, 5, 99], [3, 98, 99]]]))
    assert before >= 400 * token and store.held_bytes() <= (3 * 4 + SPARE + 4) * token
    assert store.fast_bytes() - store.held_bytes() == 8 * HEADS * 100
    for i in range(300):  # a window of ten blocks
        store.append(torch.randn(1, HEADS, 1, 8), torch.randn(1, HEADS, 1, 8))
        last = store.length // 4
        store.release(torch.arange(last - 9, last + 1).expand(1, HEADS, -1))
        assert store.held_bytes() <= (12 * 4 + SPARE + 4) * token * 9 // 8, i
    assert store.bytes() == 700 * token and store.key_bytes() * 2 == store.bytes()


def test_copies_are_rare() -> None:
    store, places = filled(), set()
    for _ in range(400):
        store.append(torch.zeros(1, HEADS, 1, 8), torch.zeros(1, HEADS, 1, 8))
        last = store.length // 4
        store.release(torch.arange(last - 39, last + 1).expand(1, HEADS, -1))
        places.add(id(store.pool))
        del last
    assert store.pool.keys.shape[2] <= (45 + 1) * 4 + SPARE + 4


def test_what_was_released_cannot_be_had() -> None:
    store = filled()
    store.release(torch.tensor([[[0, 5, 99], [3, 98, 99]]]))
    with pytest.raises(StoreError, match="got a selection with blocks that were released"):
        store.wait(torch.tensor([[[0], [0]]]))
    for call in (store.view, store.whole, lambda: next(store.pieces())):
        with pytest.raises(StoreError, match="attends to everything after blocks were evicted"):
            call()
    with pytest.raises(StoreError, match="got a selection with blocks that were released"):
        store.keys_of(0, 5)


def test_the_open_block_cannot_be_released() -> None:
    store = filled(401)
    with pytest.raises(StoreError, match="got a release of the block that is still growing"):
        store.release(torch.tensor([[[0, 5, 99], [3, 98, 99]]]))


def test_what_is_saved_has_zeros_where_blocks_are_gone() -> None:
    store = filled()
    keys = store.view()[0].clone()
    store.release(torch.tensor([[[0, 5, 99], [3, 98, 99]]]))
    export = store.export()
    unit = torch.cat(list(export.units)).view(torch.float32).view(100, HEADS, 2, 4, 8)  # blocks, heads, keys and values
    assert not unit[1].any() and torch.equal(unit[5, 0, 0], keys[0, 0, 20:24]) and not unit[5, 1].any()


def uneven(store: EvictingPool, few: int) -> None:
    """The first head keeps everything, the other its first `few` blocks and the last."""
    blocks = -(-store.length // store.block_size)
    kept = torch.full((store.batch, HEADS, blocks), -1)
    kept[:, 0] = torch.arange(blocks)
    kept[:, 1, :few], kept[:, 1, few] = torch.arange(few), blocks - 1
    store.release(kept)


def storage_bytes(store: EvictingPool) -> int:
    """Return what torch holds for keys and values, each piece of memory once."""
    pieces = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in (store.keys, store.values)}
    return sum(pieces.values())


def test_a_head_that_keeps_everything_makes_no_other_pay() -> None:
    store, token = filled(), 16 * 4
    uneven(store, 4)
    assert store.held_bytes() == storage_bytes(store) == ((100 + 5) * 4 + HEADS * SPARE) * token
    assert store.fast_bytes() - store.held_bytes() == 8 * HEADS * 100
    store.append(torch.randn(1, HEADS, 1, 8), torch.randn(1, HEADS, 1, 8))
    assert store.held_bytes() == storage_bytes(store) == ((100 + 5) * 4 + HEADS * SPARE) * token
    assert store.bytes() == 401 * HEADS * token  # what there would be with nothing evicted


def test_heads_that_keep_about_as_much_stay_a_rectangle_and_come_back_to_it() -> None:
    store = filled()
    store.release(torch.tensor([[[*range(80), 99], [*range(75), *[-1] * 5, 99]]]))
    assert store.arena is None
    uneven(store, 4)
    assert store.arena is not None
    store.release(torch.tensor([[[*range(5), 99], [*range(4), 99, -1]]]))
    assert store.arena is None and store.held_bytes() == storage_bytes(store) == HEADS * (6 * 4 + SPARE) * 16 * 4


def test_an_uneven_one_forks_without_a_copy_until_one_goes_on() -> None:
    store = filled(399)
    uneven(store, 4)
    other = store.fork()
    assert other.keys.data_ptr() == store.keys.data_ptr()
    token = torch.ones(1, HEADS, 1, 8)
    store.append(token, token)
    other.append(-token, -token)
    for one, sign in ((store, 1), (other, -1)):
        keys, _, slots = one.wait(torch.full((1, HEADS, 1), 99))
        for head in range(HEADS):
            at = int(slots[0, head, 0]) * 4 + 3
            assert torch.equal(keys[0, head, at], sign * torch.ones(8))
