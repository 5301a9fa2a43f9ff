"""`Growing` is a list of tokens, whatever is done to it; `SharedPool` puts blocks together from two layers by the token.

Where blocks are given back, keys stay as long as any layer of the group needs them, and no longer.
"""

import copy

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from attnpred.errors import ConfigError, StoreError
from attnpred.kernels.shared import Split
from attnpred.store.evictable import Evictable
from attnpred.store.growing import Growing
from attnpred.store.pool import BlockPool
from attnpred.store.shared import CROP, SharedPool

P, L, SINKS, RECENT = 4, 203, 6, 10

OPERATIONS = st.lists(
    st.one_of(
        st.tuples(st.just("append"), st.integers(1, 90)),
        st.tuples(st.just("crop"), st.integers(0, 200)),
        st.tuples(st.just("drop"), st.integers(0, 200)),
        st.tuples(st.just("fork"), st.integers(0, 1)),
    ),
    max_size=12,
)


@given(OPERATIONS, st.sampled_from([0, 64]))
@example([("append", 5), ("fork", 0), ("append", 3), ("append", 2)], 64)  # both go on from there
@settings(max_examples=60, deadline=None, derandomize=True)
def test_growing_keeps_what_a_list_keeps(operations: list[tuple[str, int]], spare: int) -> None:
    twins = [(Growing(spare), {"start": 0, "tokens": []})]
    for number, (name, how) in enumerate(operations):
        one, plain = twins[number % len(twins)]
        if name == "append":
            new = [1000.0 * number + i for i in range(how)]
            one.append(torch.tensor(new)[None, None, :, None].expand(2, 1, how, 3))
            plain["tokens"] += new
        elif name == "crop":
            one.crop(how)
            plain["tokens"] = plain["tokens"][: max(0, how - plain["start"])]
            plain["start"] = min(plain["start"], how)
        elif name == "drop" and one.stop:
            one.drop(how, 8)
            cut = max(0, min(how - plain["start"], len(plain["tokens"])))
            plain["tokens"], plain["start"] = plain["tokens"][cut:], plain["start"] + cut
        elif name == "fork" and one.stop:
            twins.append((copy.deepcopy(one), copy.deepcopy(plain)))
        for other, list_ in twins:
            assert (other.start, other.stop) == (list_["start"], list_["start"] + len(list_["tokens"]))
            if other.view().ndim == 4:
                assert other.view()[1, 0, :, 2].tolist() == list_["tokens"]


def filled() -> tuple[SharedPool, Tensor, Tensor, Tensor]:
    """Return a store, its own keys, those of the layer below and the values; heads 0 and 2 follow, 1 does not."""
    random = torch.Generator().manual_seed(0)
    own, below, values = (torch.randn(2, 3, L, 8, generator=random) for _ in range(3))
    lower = BlockPool(P)
    store = SharedPool(P, [lower, None, lower], Split(SINKS, RECENT))
    for start, stop in ((0, 40), (40, 41), (41, 160), *((i, i + 1) for i in range(160, L))):
        lower.append(below[:, :, start:stop], values[:, :, start:stop])
        store.append(own[:, :, start:stop], values[:, :, start:stop])
        store.settle(None)
    return store, own, below, values


def mixed(own: Tensor, below: Tensor, length: int = L) -> Tensor:
    """Return the keys that the last of `length` tokens attends to; those of later ones are their own."""
    keys = own.clone()
    for token in range(length):
        if token >= SINKS and length - 1 - token >= RECENT:
            keys[:, [0, 2], token] = below[:, [0, 2], token]
    return keys


def test_a_view_and_pieces_have_own_keys_for_near_tokens_alone() -> None:
    store, own, below, values = filled()
    want = mixed(own, below)
    assert torch.equal(store.view()[0], want) and torch.equal(store.view()[1], values)
    pieces = list(store.pieces())
    assert torch.equal(torch.cat([piece.keys for piece in pieces], 2), want)
    assert torch.equal(torch.cat([piece.values for piece in pieces], 2), values)
    far = torch.cat((below[:, :1], own[:, 1:2], below[:, 2:]), 1)
    assert torch.equal(store.keys_of(0, 50), far[:, :, :200])


@pytest.mark.parametrize("length", [L, L - 6])
@pytest.mark.parametrize("selecting", [3, 6])
def test_selected_blocks_are_put_together_token_by_token(selecting: int, length: int) -> None:
    store, own, below, values = filled()
    random = torch.Generator().manual_seed(1)
    selection = torch.stack([torch.randperm(51, generator=random)[:12] for _ in range(2 * selecting)]).view(
        2, selecting, 12
    )
    selection[:, :, 0], selection[:, :, 1], selection[:, :, 2], selection[0, 0, 3] = 0, 1, 50, -1
    keys, found, slots = store.wait(selection) if length == L else store.wait_at(selection, length)
    want = mixed(own, below, length)
    for b in range(2):
        for s in range(selecting):
            for k in range(12):
                for i in range(P):
                    token = int(selection[b, s, k]) * P + i
                    if 0 <= token < L:
                        place = int(slots[b, s, k]) * P + i
                        head = s * 3 // selecting
                        assert torch.equal(keys[b, s, place], want[b, head, token])
                        assert torch.equal(found[b, s, place], values[b, head, token])


def test_own_distant_keys_are_freed() -> None:
    store, *_ = filled()
    row = 8 * 4 * 2  # one key of one head, for both rows
    near = 2 * row * (SINKS + RECENT + 2 * CROP)
    assert sum(part.keys.shape[2] for part in store.near()) <= SINKS + RECENT + 2 * CROP
    assert store.saved_bytes() >= 2 * L * row - near
    assert store.bytes() == 2 * 3 * L * 2 * 8 * 4 and store.key_bytes() * 2 == store.bytes()
    store.clear()
    assert store.fast_bytes() == store.saved_bytes() == store.length == 0


def test_more_than_is_kept_cannot_be_taken_back() -> None:
    store, own, below, _ = filled()
    with pytest.raises(ConfigError, match=f"got a crop from {L} to 60 tokens, expected at most {CROP} fewer"):
        store.crop(60)
    assert store.length == L
    store.crop(L - CROP)
    assert torch.equal(store.view()[0], mixed(own, below, L - CROP)[:, :, : L - CROP])
    store.crop(0)
    assert store.batch == store.heads == 0


def evicting() -> list[SharedPool]:
    """Return the stores of three layers: head 0 of all is one group, head 1 of the upper two another."""
    random = torch.Generator().manual_seed(0)
    split = Split(SINKS, RECENT)
    low = SharedPool(P, [None, None], split, evicts=True)
    middle = SharedPool(P, [low, None], split, evicts=True)
    high = SharedPool(P, [low, middle], split, evicts=True)
    for store in (low, middle, high):
        store.append(*(torch.randn(2, 2, L, 8, generator=random) for _ in range(2)))
        store.settle(None)
    return [low, middle, high]


def some_blocks(seed: int, share: float = 0.3) -> Tensor:
    """Return blocks of two rows and heads that stay, [2, 2, N], -1 for none: sinks, the last five, and others by chance."""
    blocks = -(-L // P)
    stays = torch.rand(2, 2, blocks, generator=torch.Generator().manual_seed(seed)) < share
    stays[..., :2] = stays[..., -5:] = True
    return torch.arange(blocks).expand_as(stays).masked_fill(~stays, -1)


def there(part: Growing | Evictable, head: int) -> Tensor:
    """Return which blocks of a head are there, [2, N]."""
    left = part.left(-(-L // P))
    return torch.ones(2, -(-L // P), dtype=torch.bool) if left is None else left[:, head]


def test_keys_stay_as_long_as_a_layer_needs_them() -> None:
    stores = evicting()
    low, middle, high = stores
    kept = [some_blocks(i) for i in range(3)]
    stays = [one >= 0 for one in kept]
    low.release(kept[0])
    assert torch.equal(there(low._values, 0), stays[0][:, 0]) and bool(there(low._keys, 0).all())
    assert torch.equal(there(low._keys, 1), stays[0][:, 1])  # nobody follows this head
    assert low.distant(0, 1).shape == (2, 1, L, 8)  # all of it, for those that have not chosen
    high.release(kept[2])
    assert bool(there(low._keys, 0).all()) and bool(there(middle._keys, 0).all())
    middle.release(kept[1])
    assert torch.equal(there(low._keys, 0), stays[0][:, 0] | stays[1][:, 0] | stays[2][:, 0])
    assert torch.equal(there(middle._keys, 0), stays[1][:, 1] | stays[2][:, 1])
    with pytest.raises(StoreError, match="after blocks were evicted"):
        low.distant(0, 1)
    before, few = low._keys.bytes(), some_blocks(9, 0.0)
    for store in stores:  # each keeps less than before, all of them nearly nothing
        store.release(few)
    assert torch.equal(there(low._keys, 0), few[:, 0] >= 0) and low._keys.bytes() < 0.6 * before


def test_what_is_left_reads_as_before() -> None:
    stores, whole = evicting(), evicting()
    kept = [some_blocks(i) for i in range(3)]
    for store, blocks in zip(stores, kept, strict=True):
        store.release(blocks)
    new = torch.randn(2, 2, 3, 8)
    for store, other, blocks in zip(stores, whole, kept, strict=True):
        for one in (store, other):
            one.append(new, new)
        for length in (None, L - 6):
            found, want = (
                one.wait(blocks) if length is None else one.wait_at(blocks, length) for one in (store, other)
            )
            shown = (blocks >= 0).repeat_interleave(P, 2)[..., None]
            for got, wanted in zip(found[:2], want[:2], strict=True):
                assert torch.equal(got.masked_fill(~shown, 0), wanted.masked_fill(~shown, 0))
        gone = torch.where(blocks < 0, torch.arange(blocks.shape[2]), -1)
        with pytest.raises(StoreError, match="released"):
            store.wait(gone)
        assert torch.equal(store.keys_of(50, 51), other.keys_of(50, 51))


def test_what_is_given_back_is_freed_in_each_part() -> None:
    stores = evicting()
    parts = [part for store in stores for part in (store._values, store._keys)]
    before = [part.bytes() for part in parts]
    saved = [store.saved_bytes() for store in stores]
    for store in stores:
        store.release(some_blocks(9, 0.0))
    assert all(part.bytes() < size / 2 for part, size in zip(parts, before, strict=True) if size)
    assert stores[0].saved_bytes() == saved[0] == 0
    assert all(store.saved_bytes() < size for store, size in zip(stores[1:], saved[1:], strict=True))
    twin = copy.deepcopy(stores)
    twin[0].clear()
    assert stores[0].fast_bytes() > 0 == twin[0].fast_bytes()
    assert twin[1].leaders[0] is twin[0] and twin[0].followers == twin[1:]
