"""The matrix of bad inputs (`tests/cli/matrix.py`): exit code 2 and one line, whatever is wrong; and nothing is written."""

from collections import Counter
from pathlib import Path

import pytest
from huggingface_hub import constants

from attnpred import hf
from attnpred.cli.main import main
from attnpred.predictor import seer_training, streaming_training, training
from tests.cli.matrix import Case, cases

LEAST = 1000
"""Cases there are at least: a table that was emptied by mistake would pass."""


class Reached(BaseException):
    """A case came as far as the long work."""


def run(case: Case, capsys: pytest.CaptureFixture[str]) -> str | None:
    """Return what is wrong with how a case ends, or None."""
    try:
        code = main(case.arguments)
    except Reached:
        return "was accepted"
    except BaseException as error:
        return f"{type(error).__name__}: {str(error)[:90]}"
    finally:
        said = capsys.readouterr()
    ours = [line for line in said.err.splitlines() if line.startswith("attnpred: ")]
    if code != 2 or len(ours) != 1 or not said.err.endswith(ours[0] + "\n"):
        return f"exit code {code}, {said.err[-200:]!r}"
    if "Traceback" in said.err or "\n  " in said.err:
        return f"more than one line: {said.err[:200]!r}"
    return None if "expected" in ours[0] or "--help" in ours[0] else f"no advice: {ours[0][:200]}"


@pytest.mark.slow
def test_every_bad_input_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def reached(*given: object, **named: object) -> object:
        raise Reached

    demo = hf.load_model("demo")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(training, "train_predictor", reached)
    monkeypatch.setattr(seer_training, "train_seer", reached)
    monkeypatch.setattr(streaming_training, "train_streaming", reached)
    wrong: dict[str, str] = {}
    seen: Counter[str] = Counter()
    for case in cases(tmp_path):
        monkeypatch.setattr(hf, "load_model", (lambda *given, **named: demo) if case.needs_model else reached)
        seen[case.arguments[0]] += 1
        if (found := run(case, capsys)) is not None:
            wrong[case.name] = found
    assert sum(seen.values()) >= LEAST and not (tmp_path / "out").exists()
    assert wrong == {}
