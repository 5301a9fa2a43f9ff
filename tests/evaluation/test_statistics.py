"""Intervals: known answers, a naive loop beside, and pairs that are found by name."""

import random

import pytest
import torch

from attnpred.evaluation.statistics import RESAMPLES, bootstrap, difference


def test_the_interval_is_that_of_a_loop_over_resamples() -> None:
    values = [0.0, 1.0, 1.0, 0.0, 1.0, 1.0, 0.25]
    generator = torch.Generator().manual_seed(3)
    picks = torch.randint(len(values), (RESAMPLES, len(values)), generator=generator).tolist()
    means = sorted(sum(values[i] for i in pick) / len(values) for pick in picks)
    low, high = bootstrap(torch.tensor(values, dtype=torch.float64), seed=3)
    assert low == pytest.approx(means[round(0.025 * RESAMPLES)])
    assert high == pytest.approx(means[round(0.975 * RESAMPLES) - 1])


def test_known_answers() -> None:
    assert bootstrap(torch.full((9,), 0.5)) == [0.5, 0.5]
    # 400 coins: the mean of a resample has a standard deviation of 0.5 / 20, so 95 % lie within 0.049
    low, high = bootstrap(torch.tensor([0.0, 1.0] * 200))
    assert low == pytest.approx(0.5 - 0.049, abs=0.008) and high == pytest.approx(0.5 + 0.049, abs=0.008)


def test_the_interval_holds_the_truth_about_as_often_as_it_says() -> None:
    rng = random.Random(1)
    held = 0
    for _ in range(200):
        low, high = bootstrap(torch.tensor([rng.gauss(2.0, 1.0) for _ in range(40)]))
        held += low <= 2.0 <= high
    assert 0.88 <= held / 200 <= 0.99


def test_pairs_are_found_by_name_and_what_is_hard_for_both_cancels() -> None:
    theirs = {f"{i}": float(i) for i in range(50)}
    ours = {name: value - 0.5 for name, value in reversed(theirs.items())} | {"new": 7.0}
    found = difference(ours, theirs)
    assert found == {"difference": -0.5, "interval": [-0.5, -0.5], "n": 50}
    assert difference({"a": 1.0}, {"b": 1.0}) == {"n": 0}
    assert difference(ours, theirs, seed=1) == difference(ours, theirs, seed=1)
