"""`BlockPool` gives back, bit by bit, what a list of tokens would, whatever the order of operations."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from attnpred.errors import ShapeError
from attnpred.store import STORES
from attnpred.store.pool import BlockPool

OPERATIONS = st.lists(
    st.one_of(
        st.tuples(st.just("append"), st.integers(1, 70)),
        st.tuples(st.just("crop"), st.integers(0, 80)),
        st.tuples(st.just("select"), st.lists(st.integers(0, 100), min_size=1, max_size=3)),
        st.tuples(st.just("repeat"), st.integers(1, 2)),
    ),
    min_size=1,
    max_size=12,
)


@pytest.mark.parametrize("store", STORES)
@given(operations=OPERATIONS, block=st.sampled_from([1, 4, 16]), seed=st.integers(0, 99))
@settings(max_examples=60, deadline=None, derandomize=True)
def test_equals_concatenation(store: str, operations: list[tuple[str, object]], block: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    pool = STORES[store](block)
    keys, values = torch.randn(2, 2, 3, 4, generator=generator), torch.randn(2, 2, 3, 6, generator=generator)
    pool.append(keys, values)
    for name, argument in operations:
        rows = keys.shape[0]
        if name == "append":
            k = torch.randn(rows, 2, argument, 4, generator=generator)
            v = torch.randn(rows, 2, argument, 6, generator=generator)
            pool.append(k, v)
            keys, values = torch.cat((keys, k), 2), torch.cat((values, v), 2)
        elif name == "crop":
            pool.crop(argument)
            keys, values = keys[:, :, :argument], values[:, :, :argument]
        elif name == "select":
            index = torch.tensor(argument) % rows
            pool.select(index)
            keys, values = keys[index], values[index]
        elif rows * argument <= 8:
            pool.repeat(argument)
            keys, values = keys.repeat_interleave(argument, 0), values.repeat_interleave(argument, 0)
        got = pool.view()
        assert torch.equal(got[0], keys) and torch.equal(got[1], values)
        assert pool.keys.is_contiguous() and pool.keys.shape[2] % block == 0
        assert pool.keys.isfinite().all() and pool.values.isfinite().all()
        assert pool.bytes() == keys.numel() * 4 + values.numel() * 4
        assert pool.key_bytes() == keys.numel() * 4


def test_memory_past_the_end_is_finite_even_if_fresh_memory_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    empty = torch.Tensor.new_empty
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda self, *a, **k: empty(self, *a, **k).fill_(torch.nan))
    pool = BlockPool(16)
    pool.append(torch.ones(1, 1, 5, 4), torch.ones(1, 1, 5, 4))
    assert pool.keys.isfinite().all()


def test_growth_is_rare() -> None:
    pool = BlockPool(16)
    pool.append(torch.zeros(1, 1, 100, 4), torch.zeros(1, 1, 100, 4))
    places = set()
    for _ in range(400):
        pool.append(torch.zeros(1, 1, 1, 4), torch.zeros(1, 1, 1, 4))
        places.add(pool.keys.data_ptr())
    assert len(places) <= 6


def test_wrong_shape_is_named() -> None:
    pool = BlockPool(16)
    pool.append(torch.zeros(1, 2, 3, 4), torch.zeros(1, 2, 3, 4))
    with pytest.raises(ShapeError, match=r"got keys of shape \(1, 3, 1, 4\), expected \[1, 2, any, 4\]"):
        pool.append(torch.zeros(1, 3, 1, 4), torch.zeros(1, 3, 1, 4))
