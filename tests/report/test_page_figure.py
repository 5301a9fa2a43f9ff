"""The picture of the page: it is written, the page holds the fact, and the text is cut into lines without losing any."""

import sys
from pathlib import Path

import pytest
import torch

from attnpred.errors import MissingExtraError
from attnpred.report.page_figure import LINES, WIDTH, PageView, draw_page, page_lines

FACT = "The lucky number of the gardener is 529."


def view(forecast: bool = True) -> PageView:
    text = "It rained. " * 300 + FACT + "\n\nA $new_{paragraph}$ of \\text. " + "It rained on the garden. " * 200
    start, size = text.index(FACT), 64
    spans = [(i, min(i + size, len(text))) for i in range(0, len(text), size)]
    values = torch.rand(6, len(spans))
    return PageView(
        model="m",
        source="a book",
        question="What?",
        answer="529",
        heads=9,
        head_name="layer 1, head 2",
        words=list("abcdef"),
        text=text,
        spans=spans,
        fact=(start, start + len(FACT)),
        share=values.mean(0),
        true=values,
        forecast=values - 0.5 if forecast else None,
        selected=values > 0.5,
    )


@pytest.mark.slow
@pytest.mark.parametrize("forecast", [True, False])
def test_a_picture_is_written(forecast: bool, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    draw_page(view(forecast), tmp_path / "page.png")
    data = (tmp_path / "page.png").read_bytes()
    assert data[:4] == b"\x89PNG" and len(data) > 30_000


def test_the_page_holds_the_fact_and_its_lines_are_the_text() -> None:
    shown = view()
    lines = page_lines(shown.text, shown.fact)
    assert len(lines) == LINES and all(len(line) <= WIDTH for _, line in lines)
    assert all(shown.text.startswith(line, place) for place, line in lines)
    assert lines[0][0] <= shown.fact[0] and shown.fact[1] <= lines[-1][0] + len(lines[-1][1])


@pytest.mark.parametrize("place", [0, 5000])
def test_a_page_at_the_edge_is_whole(place: int) -> None:
    text = "It rained on the garden that day. " * 200
    assert len(page_lines(text, (place, place + 10))) == LINES
    assert len(page_lines("Short.", (0, 5))) == 1


def test_a_missing_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'attnpred\[plot\]'"):
        draw_page(view(), tmp_path / "page.png")
