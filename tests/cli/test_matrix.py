"""A part of the matrix of bad inputs (`tests/cli/matrix.py`), every command in it; `tools.reliability` runs all of it."""

from importlib.util import find_spec
from pathlib import Path

import pytest

from attnpred.cli.main import COMMANDS
from tests.cli.matrix import Case, cases
from tests.cli.matrix_run import run, run_all

LEAST = 1700
"""Cases there are at least: a table that was emptied by mistake would pass."""
EVERY = 6
LEFT_OUT = {"lm-eval"} if find_spec("lm_eval") else set[str]()
"""With its extra it hands everything to the harness."""


@pytest.mark.slow
def test_bad_inputs_are_one_line(tmp_path: Path) -> None:
    every = list(cases(tmp_path))
    assert len(every) >= LEAST and {case.arguments[0] for case in every} == set(COMMANDS) - LEFT_OUT
    found = run_all(every[::EVERY])
    assert [wrong for outcome in found for wrong in outcome.wrong_ones] == []
    assert not (tmp_path / "out").exists()


def test_the_check_can_fail(tmp_path: Path) -> None:
    assert run(Case("help", ("--help",))) == "exit code 0, ''"
    (tmp_path / "text.txt").write_text("words")
    (outcome,) = run_all([Case("good", ("generate", "demo", "--prompt-file", str(tmp_path / "text.txt")))])
    assert outcome.wrong_ones == ["good: was accepted"]
