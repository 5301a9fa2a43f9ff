"""`attnpred info`."""

import json

import pytest

from attnpred.cli.main import main
from attnpred.kernels import BACKENDS
from attnpred.policies import POLICIES


def test_json_is_one_object_on_the_last_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert set(facts["policies"]) == set(POLICIES) and set(facts["kernels"]) == set(BACKENDS)
    assert {"attnpred", "torch", "transformers", "python"} == set(facts["versions"])
    assert "cpu" in facts["devices"]


def test_every_policy_and_kernel_says_what_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert all(facts["policies"].values()) and all(facts["kernels"].values())


def test_text_names_every_policy(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info"]) == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in POLICIES)
