"""The heat map has a panel for each kv head and a frame for each group; without matplotlib there is one clear line."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from attnpred.errors import ConfigError, MissingExtraError
from attnpred.predictor.layer_groups import LayerGroups, grouped
from attnpred.report.layers_figure import draw


def some(heads: int = 5) -> LayerGroups:
    said: dict[str, Any] = {
        "base_model": "m", "fingerprint": "f", "query_heads": heads, "kv_heads": heads, "layers": (0, 2, 4), "rows": 1
    }  # fmt: skip
    return grouped(torch.rand(heads, 3, 3, generator=torch.Generator().manual_seed(0)), 0.5, **said)


def test_a_picture_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from matplotlib.figure import Figure

    drawn: list[Figure] = []
    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **k: (drawn.append(self), save(self, *a, **k))[1])
    found = some()
    draw(found, tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes()[:4] == b"\x89PNG"
    panels = [axis for axis in drawn[0].axes if axis.images]
    assert len(panels) == 5
    for panel, groups in zip(panels, found.groups, strict=True):
        assert [round(patch.get_width()) for patch in panel.patches] == [len(group) for group in groups]


def test_another_kind_of_picture_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"ends in \.png or \.svg"):
        draw(some(), tmp_path / "a.jpg")


def test_a_missing_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(MissingExtraError, match="pip install"):
        draw(some(), tmp_path / "a.png")
