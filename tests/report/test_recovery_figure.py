"""One line per policy in each panel, nothing outside the axes, names that do not cover each other."""

import itertools
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from attnpred.errors import ConfigError, MissingExtraError
from attnpred.report.recovery_figure import BACK, ORACLE, OURS, SEEING, draw, family_of, name_of, spread

POLICIES = ("h2o:calibration_interval=5", "ema:rate=0.1,calibration_interval=5", "quest", "predicted", "oracle")
BUDGETS = (0.25, 0.076923, 0.03125)


def rows() -> Iterator[dict[str, Any]]:
    for i, policy in enumerate(POLICIES):
        for budget in BUDGETS:
            value = 0.8 + 0.03 * i + 0.1 * budget
            yield {
                "policy": policy, "budget": budget, "value": value, "interval": [value - 0.05, value + 0.04],
                "recovery": 0.7 * value, "length": 4096, "n": 12, "steps": 96,
            }  # fmt: skip


@pytest.fixture
def axes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    from matplotlib.figure import Figure

    drawn: list[Any] = []
    save = Figure.savefig

    def keep(figure: Any, path: Path, **options: Any) -> None:
        drawn.extend(figure.axes)
        save(figure, path, **options)

    monkeypatch.setattr(Figure, "savefig", keep)
    draw(list(rows()), tmp_path / "a.png")
    data = (tmp_path / "a.png").read_bytes()
    assert data[:4] == b"\x89PNG" and b"IEND" in data[-12:]
    return drawn


def test_each_panel_has_a_line_per_policy(axes: list[Any]) -> None:
    for axis, key in zip(axes, ("value", "recovery"), strict=True):
        assert [line.get_label() for line in axis.lines] == list(POLICIES)
        for line in axis.lines:
            own = {row["budget"]: row[key] for row in rows() if row["policy"] == line.get_label()}
            assert dict(zip(line.get_xdata(), line.get_ydata(), strict=True)) == own


def test_axes_contain_lines_and_bands(axes: list[Any]) -> None:
    bottom, top = axes[0].get_ylim()
    assert bottom <= min(row["interval"][0] for row in rows()) and top >= max(row["interval"][1] for row in rows())
    for axis in axes:
        low, high = axis.get_xlim()
        assert low < BUDGETS[-1] and high > BUDGETS[0]
        assert [tick.get_text() for tick in axis.get_xticklabels()] == ["1/32", "1/13", "1/4"]


def test_every_line_is_named_and_told_apart(axes: list[Any]) -> None:
    assert sorted(text.get_text() for text in axes[0].texts) == sorted(map(name_of, POLICIES))
    assert [name_of(policy) for policy in POLICIES[:3]] == ["h2o", "ema 0.1", "quest"]
    styles = {(line.get_color(), line.get_marker(), line.get_linestyle()) for line in axes[0].lines}
    assert len(styles) == len(POLICIES)
    widest = max(axes[0].lines, key=lambda line: line.get_linewidth())
    assert widest.get_label() == "predicted"


def test_names_are_moved_apart() -> None:
    places = spread([1.0, 0.99, 0.985, 0.5, 0.499], gap=0.05, high=1.0)
    assert max(places) <= 1.0 and all(a - b > 0.0499 for a, b in itertools.pairwise(places))
    assert spread([0.9, 0.5], 0.05, 1.0) == [0.9, 0.5]


def test_families() -> None:
    paper = "predicted:predictor=attention-predictor-cnn,calibration_interval=5"
    known = {"oracle": ORACLE, "predicted": OURS, "predicted:late_share=0": OURS, paper: BACK, "quest": SEEING,
             "mean_key": SEEING, "mean_key_last": BACK, "ema:rate=0.1": BACK}  # fmt: skip
    assert {policy: family_of(policy) for policy in known} == known
    assert name_of(paper) == "AttentionPredictor's CNN"


@pytest.mark.parametrize("wrong", [[], [*rows(), *rows()]])
def test_rows_of_several_texts_are_refused(wrong: list[dict[str, Any]], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="give rows of one text and one length"):
        draw(wrong, tmp_path / "a.png")


def test_a_missing_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'attnpred\[plot\]'"):
        draw(list(rows()), tmp_path / "a.png")
