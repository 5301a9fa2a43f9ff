"""The figure is a picture with three panels; without matplotlib there is one clear line."""

import sys
from pathlib import Path

import pytest
import torch

from attnpred.errors import ConfigError, MissingExtraError, OutputError
from attnpred.report.attention_figure import draw


def test_a_picture_is_written(tmp_path: Path) -> None:
    values = torch.rand(30, 40)
    draw(values, values - 0.5, values > 0.5, "layer 1", tmp_path / "a.png")
    data = (tmp_path / "a.png").read_bytes()
    assert data[:4] == b"\x89PNG" and len(data) > 10_000


def test_a_figure_replaces_nothing_but_a_file(tmp_path: Path) -> None:
    values = torch.rand(3, 4)
    (tmp_path / "full.png").symlink_to("/dev/full")
    with pytest.raises(OutputError, match="which is a device"):
        draw(values, values, values > 0.5, "x", tmp_path / "full.png")
    with pytest.raises(ConfigError, match=r"got .*a.txt2, expected a name that ends in .png"):
        draw(values, values, values > 0.5, "x", tmp_path / "a.txt2")
    assert {path.name for path in tmp_path.iterdir()} == {"full.png"}


def test_all_zero_attention_is_drawn_too(tmp_path: Path) -> None:
    draw(torch.zeros(3, 4), torch.zeros(3, 4), torch.zeros(3, 4), "empty", tmp_path / "a.png")
    assert (tmp_path / "a.png").exists()


def test_a_missing_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(
        MissingExtraError, match=r"got no module 'matplotlib', expected it installed: pip install 'attnpred\[plot\]'"
    ):
        draw(torch.zeros(3, 4), torch.zeros(3, 4), torch.zeros(3, 4), "x", tmp_path / "a.png")
