"""`weigh`, `remember` and `best`: the numba backend against torch, which is short enough to read."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from attnpred.kernels import DIGEST, STREAM_BACKENDS

SLOW, FAST = STREAM_BACKENDS["torch"], STREAM_BACKENDS["numba"]

pytestmark = pytest.mark.skipif(DIGEST != "numba", reason="numba is not installed")


def memory(batch: int, heads: int, blocks: int, room: int, seed: int) -> tuple[Tensor, Tensor]:
    """Return an estimate and peaks with room for more; what is not in use is NaN."""
    generator = torch.Generator().manual_seed(seed)
    estimate = torch.randn(batch, heads, blocks, generator=generator) * 3 - 5
    peaks = torch.full((batch, heads, 2, blocks + room), torch.nan)
    peaks[..., : blocks + 1] = torch.randn(batch, heads, 2, blocks + 1, generator=generator) * 3 - 5
    return estimate, peaks


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 3), st.integers(1, 5), st.integers(1, 90), st.booleans(), st.integers(0, 99), st.data())
def test_weigh(batch: int, heads: int, blocks: int, shared: bool, seed: int, data: st.DataObject) -> None:
    estimate, peaks = memory(batch, heads, blocks, 5, seed)
    first = data.draw(st.integers(0, blocks))
    last = data.draw(st.integers(first, blocks))
    weights, distance = torch.randn(1 if shared else heads, 4), torch.rand(last - first)
    arguments = estimate, peaks, weights, distance, first, last
    torch.testing.assert_close(FAST["weigh"](*arguments), SLOW["weigh"](*arguments))


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 3), st.integers(1, 5), st.integers(1, 90), st.integers(0, 99), st.data())
def test_remember(batch: int, heads: int, blocks: int, seed: int, data: st.DataObject) -> None:
    estimate, peaks = memory(batch, heads, blocks, 5, seed)
    chosen = data.draw(st.integers(1, blocks))
    selection = torch.stack([torch.randperm(blocks + 1)[:chosen] for _ in range(batch * heads)]).view(batch, heads, -1)
    maxima = torch.rand(batch, heads, chosen) ** 20
    maxima[..., 0] = 0
    got, want = peaks.clone(), peaks.clone()
    FAST["remember"](got, torch.tensor([0.02, 0.1]), blocks + 1, estimate, selection, maxima)
    SLOW["remember"](want, torch.tensor([0.02, 0.1]), blocks + 1, estimate, selection, maxima)
    torch.testing.assert_close(got, want, equal_nan=True)


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 3), st.integers(1, 5), st.integers(1, 200), st.sampled_from(("any", "ties", "-inf")), st.data())
def test_best(batch: int, heads: int, blocks: int, kind: str, data: st.DataObject) -> None:
    count = data.draw(st.integers(0, blocks))
    scores = torch.randn(batch, heads, blocks + 4)[..., 1 : 1 + blocks]
    scores = scores.round() if kind == "ties" else scores
    scores[scores < (0 if kind == "-inf" else -torch.inf)] = -torch.inf
    got = FAST["best"](scores, count)
    assert all(len(set(row.tolist())) == count for row in got.flatten(0, 1))
    kept, want = scores.gather(-1, got), scores.gather(-1, SLOW["best"](scores, count))
    assert torch.equal(kept.sort(-1).values, want.sort(-1).values)
