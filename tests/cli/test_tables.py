"""Tables of the terminal: every word is there, columns are in line, and a narrow terminal cuts nothing off."""

import os
import sys

import pytest

from attnpred.cli.tables import drawn

HEAD = ("policy", "what it does")
ROWS = [("ema", "an average of past attention [of blocks]"), ("predicted:late_share=0", "a forecast")]


def test_a_line_for_each_row_where_there_is_no_terminal() -> None:
    lines = drawn(HEAD, [*ROWS, ("long", "word " * 200)]).splitlines()
    assert len(lines) == 4 and all(line == line.rstrip() for line in lines)
    assert len({line.index(cell) for line, (_, cell) in zip(lines, [HEAD, *ROWS], strict=False)}) == 1
    assert "[of blocks]" in lines[1], "what looks like rich's markup is none"


def test_numbers_end_in_line_and_a_table_may_have_no_head() -> None:
    lines = drawn(("", ""), [("a", "7"), ("bb", "1,000")], numbers=True).splitlines()
    assert lines == ["a       7", "bb  1,000"]


def test_a_narrow_terminal_cuts_nothing_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.setattr("shutil.get_terminal_size", lambda: os.terminal_size((30, 20)))
    lines = drawn(HEAD, ROWS).splitlines()
    assert max(map(len, lines)) <= 30 and len(lines) > 3
    words = " ".join(lines).split()
    assert {"average", "attention", "forecast"} <= set(words)
