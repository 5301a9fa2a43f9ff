"""`attnpred train --predictor seer-gate`: from a folder of traces to a gate that the policy takes, and what is refused."""

import json
from pathlib import Path

import pytest

from attnpred.cli.main import main
from attnpred.policies import Seer
from attnpred.predictor.pretrained import Predictor
from tests.predictor.test_seer_training import GROUP, HEADS, LAYERS, P, written

OPTIONS = ["--predictor", "seer-gate", "--steps", "2", "--sink-tokens", str(P), "--recent-tokens", str(P)]


def test_a_gate_is_made_and_said_as_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    traces, out = written(tmp_path / "traces"), tmp_path / "gate"
    assert main(["train", str(traces), "--out", str(out), "--rank", "3", *OPTIONS, "--json"]) == 0
    said = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert said["out"] == str(out) and set(said["recovered"]) == {"0.2500", "0.1250", "0.0769", "0.0625", "0.0312"}
    made = Predictor.from_pretrained(out)
    assert made.config.rank == 3 and (made.config.heads, made.config.group) == (HEADS, GROUP)
    assert said["parameters"] == LAYERS * HEADS * (GROUP + 3) * 8 * 3 and Seer(made).predictor is made


def test_the_text_names_every_budget(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    traces = written(tmp_path / "traces")
    assert main(["train", str(traces), "--out", str(tmp_path / "gate"), *OPTIONS]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "parameters" in lines[0] and [line.split()[0] for line in lines[2:]][:2] == ["0.2500", "0.1250"]


def test_an_unknown_kind_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    traces = written(tmp_path / "traces")
    assert main(["train", str(traces), "--out", str(tmp_path / "gate"), "--predictor", "seer"]) == 2
    assert "got --predictor 'seer', expected cnn or seer-gate" in capsys.readouterr().err
