"""`attnpred lm-eval` hands everything on, and says what is missing."""

import sys
import types

import pytest

from attnpred.cli.main import main


def test_a_missing_harness_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.setitem(sys.modules, "lm_eval.api.registry", None)
    monkeypatch.delitem(sys.modules, "attnpred.evaluation.harness", raising=False)
    assert main(["lm-eval", "--tasks", "x"]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "pip install 'attnpred[eval]'" in said


@pytest.mark.parametrize("code", [0, 3])
def test_options_and_exit_code_are_those_of_the_harness(code: int, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[str]] = []
    fake = types.ModuleType("attnpred.evaluation.harness")
    fake.main = lambda: seen.append(list(sys.argv)) or code  # type: ignore[attr-defined,func-returns-value]
    monkeypatch.setitem(sys.modules, fake.__name__, fake)
    import attnpred.evaluation

    monkeypatch.setattr(attnpred.evaluation, "harness", fake, raising=False)
    before = list(sys.argv)
    assert main(["lm-eval", "--model", "attnpred", "--model_args", "pretrained=demo,budget=96"]) == code
    assert seen == [["lm-eval", "--model", "attnpred", "--model_args", "pretrained=demo,budget=96"]]
    assert sys.argv == before
