"""`Growing` is a list of tokens, whatever is done to it; `SharedPool` puts blocks together from two layers by the token."""

import copy

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from attnpred.errors import ConfigError
from attnpred.kernels.shared import Split
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
    """Return the keys that the last of `length` tokens attends to."""
    keys = own[:, :, :length].clone()
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


@pytest.mark.parametrize("selecting", [3, 6])
def test_selected_blocks_are_put_together_token_by_token(selecting: int) -> None:
    store, own, below, values = filled()
    random = torch.Generator().manual_seed(1)
    selection = torch.stack([torch.randperm(51, generator=random)[:12] for _ in range(2 * selecting)]).view(
        2, selecting, 12
    )
    selection[:, :, 0], selection[:, :, 1], selection[:, :, 2], selection[0, 0, 3] = 0, 1, 50, -1
    keys, found, slots = store.wait(selection)
    want = mixed(own, below)
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
