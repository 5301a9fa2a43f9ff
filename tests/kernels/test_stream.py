"""`weigh`, `remember` and `choose`: the numba backend against torch, which is short enough to read."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from attnpred.kernels import DIGEST, STREAM_BACKENDS
from attnpred.kernels.digest import DOUBT, FLOOR

SLOW, FAST = STREAM_BACKENDS["torch"], STREAM_BACKENDS["numba"]

pytestmark = pytest.mark.skipif(DIGEST != "numba", reason="numba is not installed")


def memory(batch: int, heads: int, blocks: int, room: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return an estimate, a past with room for more, and weights; what is not in use is NaN."""
    generator = torch.Generator().manual_seed(seed)
    estimate = torch.randn(batch, heads, blocks, generator=generator) * 3 - 5
    past = torch.full((batch, heads, 1, blocks + room), torch.nan)
    past[..., : blocks + 1] = (torch.randn(batch, heads, 1, blocks + 1, generator=generator) * 3 - 5).clamp(FLOOR, 0)
    return estimate, past, torch.randn(batch, heads, 4, generator=generator)


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 3), st.integers(1, 5), st.integers(1, 90), st.integers(0, 99), st.data())
def test_weigh(batch: int, heads: int, blocks: int, seed: int, data: st.DataObject) -> None:
    estimate, past, weights = memory(batch, heads, blocks, 5, seed)
    first = data.draw(st.integers(0, blocks))
    last = data.draw(st.integers(first, blocks))
    arguments = estimate, past, weights, torch.rand(last - first), first, last, blocks + 2
    got = FAST["weigh"](*arguments)
    torch.testing.assert_close(got, SLOW["weigh"](*arguments), atol=1e-5, rtol=1e-5)
    assert not got[..., :first].any() and not got[..., last:].any()


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 3), st.integers(1, 5), st.integers(1, 90), st.integers(0, 99), st.data())
def test_remember(batch: int, heads: int, blocks: int, seed: int, data: st.DataObject) -> None:
    estimate, past, weights = memory(batch, heads, blocks, 5, seed)
    chosen = data.draw(st.integers(1, blocks))
    selection = torch.stack([torch.randperm(blocks + 1)[:chosen] for _ in range(batch * heads)]).view(batch, heads, -1)
    maxima = torch.rand(batch, heads, chosen) ** 20
    maxima[..., 0] = 0
    got, want, distance = past.clone(), past.clone(), torch.rand(blocks)
    FAST["remember"](got, 0.03, blocks + 1, estimate, weights, distance, selection, maxima)
    SLOW["remember"](want, 0.03, blocks + 1, estimate, weights, distance, selection, maxima)
    torch.testing.assert_close(got, want, equal_nan=True, atol=2e-4, rtol=1e-5)


@pytest.mark.parametrize("backend", [SLOW, FAST])
def test_a_block_that_its_digest_points_at_is_not_overlooked_for_its_past(backend: Any) -> None:
    """Weights that trust the past alone, and a block without one: its forecast is its share by digest, less `DOUBT`."""
    estimate, past = torch.tensor([[[-0.5, -9.0, -5.0]]]), torch.tensor([[[[FLOOR, -3.0, -3.0]]]])
    weights = torch.tensor([[[0.0, 1.0, 0.0, 0.25]]])
    found = backend["weigh"](estimate, past, weights, torch.zeros(3), 0, 3, 3) + 0.25
    torch.testing.assert_close(found, torch.tensor([[[-0.5 - DOUBT, -2.75, -2.75]]]))


def test_remember_averages_what_was_attended_and_what_was_guessed() -> None:
    """Against the words of it, number by number: two blocks attended, one guessed, one that no digest knows."""
    rate, past = 0.25, torch.tensor([0.5, 0.1, 0.2, 0.01]).log().view(1, 1, 1, 4)
    estimate, weights = torch.tensor([[[-1.0, -2.0, -3.0]]]), torch.tensor([[[0.5, 0.25, 1.0, -0.1]]])
    distance, selection, maxima = torch.tensor([1.5, 1.0, 0.0]), torch.tensor([[[0, 1]]]), torch.tensor([[[0.6, 0.3]]])
    guessed = math.exp(0.5 * -3.0 + 0.25 * math.log(0.2) + 1.0 * 0.0 - 0.1)
    want = [0.75 * 0.5 + 0.25 * 0.6, 0.75 * 0.1 + 0.25 * 0.3, 0.75 * 0.2 + 0.25 * guessed, 0.75 * 0.01]
    for backend in (FAST, SLOW):
        got = past.clone()
        backend["remember"](got, rate, 4, estimate, weights, distance, selection, maxima)
        assert got.exp().flatten().tolist() == pytest.approx(want, rel=1e-4)


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
    estimate, past, weights = memory(1, 5, 700, 5, 0)
    arguments = estimate, past, weights, torch.rand(690), 4, 694, 700
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
