"""Each pattern, planted in a head of noise, is found in that head and in no other."""

import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from attnpred.errors import MissingExtraError, ShapeError
from tools.patterns_figure import RECENT, SINKS, TOP, draw, middle, pattern_scores, season, strongest

STEPS, BLOCKS, PERIOD = 256, 200, 22
PLANTED = {"re-access": (0, 1), "sequential": (1, 0), "seasonal": (1, 1)}  # layer and head; (0, 0) is noise


def trace() -> Tensor:
    """Return attention [2, 2, T, N] of noise, a head of each pattern among it, bright sinks and a bright recent window."""
    rows = 1e-3 * torch.rand(2, 2, STEPS, BLOCKS, generator=torch.Generator().manual_seed(0))
    steps = torch.arange(STEPS)
    rows[0, 1][:, [30, 35, 60, 61, 90, 120, 140, 150]] += 0.02
    for start in (20, 70, 140):
        rows[1, 0][steps, start + steps // 16] += 0.02
    rows[1, 1][0::PERIOD, 20:150] += 0.02
    rows[..., 0] += 0.2
    for t in range(STEPS):  # every head attends to what is near, which is none of the patterns
        last = BLOCKS - (STEPS - 1 - t) // 16
        rows[:, :, t, last - 12 : last] += 0.1
        rows[:, :, t, last:] = 0
    return rows


@pytest.mark.parametrize("pattern", PLANTED)
def test_a_planted_pattern_is_found_where_it_is(pattern: str) -> None:
    scores = pattern_scores(trace())[pattern]
    assert scores.shape == (2, 2)
    there = scores[PLANTED[pattern]]
    others = scores[torch.tensor([[place != PLANTED[pattern] for place in ((i, 0), (i, 1))] for i in range(2)])]
    assert there > 0.5 and others.max() < 0.15


def test_the_period_is_found() -> None:
    assert int(season(middle(trace()[1, 1]).sqrt())[1]) == PERIOD


def test_scores_are_bounded_and_do_not_depend_on_scale() -> None:
    values = trace()
    for name, scores in pattern_scores(values).items():
        assert float(scores.max()) <= 1 and float(scores.min()) >= (-1 if name == "sequential" else 0)
        torch.testing.assert_close(pattern_scores(values / 7)[name], scores, atol=1e-3, rtol=1e-3)


def test_empty_rows_score_nothing() -> None:
    scores = pattern_scores(torch.zeros(1, 1, STEPS, BLOCKS))
    assert float(scores["sequential"]) == float(scores["seasonal"]) == 0


def test_the_strongest_heads_are_chosen_over_all_texts() -> None:
    noise = torch.rand(2, 2, STEPS, BLOCKS, generator=torch.Generator().manual_seed(1))
    chosen = strongest({"noise": noise, "planted": trace()})
    assert {head.pattern: (head.layer, head.head) for head in chosen} == PLANTED
    assert {head.text for head in chosen} == {"planted"}


def test_a_trace_that_is_too_short_is_refused() -> None:
    with pytest.raises(ShapeError, match="give a longer trace"):
        pattern_scores(torch.rand(1, 1, STEPS, STEPS // 16 + RECENT + SINKS + TOP))
    with pytest.raises(ShapeError, match="got 100 steps"):
        pattern_scores(torch.rand(1, 1, 100, BLOCKS))


def test_a_whole_picture_is_written(tmp_path: Path) -> None:
    draw(strongest({"planted": trace()}), tmp_path / "a.png")
    data = (tmp_path / "a.png").read_bytes()
    assert data[:4] == b"\x89PNG" and b"IEND" in data[-12:] and len(data) > 10_000
    draw(strongest({"empty": torch.zeros(1, 1, STEPS, BLOCKS)}), tmp_path / "b.png")


def test_a_missing_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'attnpred\[plot\]'"):
        draw([], tmp_path / "a.png")
