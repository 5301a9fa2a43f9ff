"""Tokens are drawn from the model's own distribution, at its temperature, from the likeliest that hold the share."""

from collections import Counter

import pytest
import torch

from attnpred.serving.drawing import Drawer, Drawing

LOGITS = torch.tensor([1.0, 3.0, 2.0, -5.0, 2.5])


def drawn(drawing: Drawing, times: int = 400, row: int = 0) -> list[int]:
    drawer = Drawer(drawing, row)
    return [drawer.draw(LOGITS).token for _ in range(times)]


def test_zero_is_greedy() -> None:
    assert set(drawn(Drawing(0.0))) == {1}


@pytest.mark.parametrize("heat", [0.5, 1.0, 2.0])
def test_shares_are_those_of_the_distribution(heat: float) -> None:
    counts, wanted = Counter(drawn(Drawing(heat, seed=3), 4000)), (LOGITS / heat).softmax(0)
    for token, share in enumerate(wanted.tolist()):
        assert abs(counts[token] / 4000 - share) < 0.04


@pytest.mark.parametrize(
    ("share", "tokens"), [(1e-60, {1}), (0.3, {1}), (0.6, {1, 4}), (0.8, {1, 4, 2}), (1.0, {0, 1, 2, 4})]
)
def test_the_likeliest_hold_the_share(share: float, tokens: set[int]) -> None:
    assert set(drawn(Drawing(1.0, share, seed=1))) - {3} == tokens


def test_a_seed_repeats_and_rows_differ() -> None:
    assert drawn(Drawing(seed=5)) == drawn(Drawing(seed=5)) != drawn(Drawing(seed=5), row=1)
    assert drawn(Drawing()) != drawn(Drawing())
    state = torch.random.get_rng_state()
    drawn(Drawing(seed=5))
    assert torch.equal(state, torch.random.get_rng_state())


def test_probabilities_are_the_model_s_own_whatever_the_temperature() -> None:
    found = Drawer(Drawing(2.0, seed=1, alternatives=2)).draw(LOGITS.bfloat16())
    assert found.chance is not None and [one.token for one in found.alternatives] == [1, 4]
    assert found.chance.logprob == pytest.approx(float(LOGITS.log_softmax(0)[found.token]), abs=1e-5)
    assert Drawer(Drawing(0.0)).draw(LOGITS).chance is None
