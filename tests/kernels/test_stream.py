"""`weigh`, `remember` and `choose`: the numba backend against torch, which is short enough to read."""

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
    arguments = estimate, peaks, weights, distance, first, last, blocks + 2
    got = FAST["weigh"](*arguments)
    torch.testing.assert_close(got, SLOW["weigh"](*arguments))
    assert not got[..., :first].any() and not got[..., last:].any()


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


@settings(deadline=None, max_examples=80)
@given(st.integers(1, 3), st.integers(1, 5), st.integers(0, 200), st.sampled_from(("any", "ties", "-inf")), st.data())
def test_choose(batch: int, heads: int, middle: int, kind: str, data: st.DataObject) -> None:
    sinks, recent, free = data.draw(st.integers(0, 3)), data.draw(st.integers(0, 3)), data.draw(st.integers(0, middle))
    scores = torch.randn(batch, heads, sinks + middle + 4)
    scores = scores.round() if kind == "ties" else scores
    scores[scores < (0 if kind == "-inf" else -torch.inf)] = -torch.inf
    scores[..., :sinks] = scores[..., sinks + middle :] = torch.nan  # nobody looks there
    arguments = scores, sinks, sinks + middle, sinks + middle + recent, free
    got, want = FAST["choose"](*arguments), SLOW["choose"](*arguments)
    assert got.shape == want.shape and got.dtype == want.dtype
    assert torch.equal(got[..., :sinks], want[..., :sinks])
    assert torch.equal(got[..., sinks + free :], want[..., sinks + free :])
    got, want = got[..., sinks : sinks + free], want[..., sinks : sinks + free]
    assert all(
        len(set(row.tolist())) == free and all(sinks <= i < sinks + middle for i in row) for row in got.flatten(0, 1)
    )
    assert torch.equal(scores.gather(-1, got).sort(-1).values, scores.gather(-1, want).sort(-1).values)


def test_choose_takes_scores_that_are_the_same_for_all_rows() -> None:
    scores = torch.randn(1, 1, 40).expand(2, 3, -1)
    got, want = (backend["choose"](scores, 1, 38, 40, 7).sort(-1).values for backend in (FAST, SLOW))
    assert torch.equal(got, want)


def test_same_result_for_any_number_of_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    from attnpred.kernels import numba_stream

    monkeypatch.setattr(numba_stream, "_PAYS", 0)
    estimate, peaks = memory(1, 5, 700, 5, 0)
    arguments = estimate, peaks, torch.randn(5, 4), torch.rand(690), 4, 694, 700
    before, found = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            scores = FAST["weigh"](*arguments)
            found.append((scores, FAST["choose"](scores, 4, 694, 700, 60)))
    finally:
        torch.set_num_threads(before)
    for scores, chosen in found[1:]:
        assert torch.equal(scores, found[0][0]) and torch.equal(chosen, found[0][1])
