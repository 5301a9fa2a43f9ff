"""Threads sleep early beside other programs, and only where nobody has said how they wait."""

import os
import sys

import pytest

from attnpred.cli.waits import wait_briefly_if_busy


@pytest.mark.parametrize(
    ("load", "before", "after"),
    [
        (9.0, {}, {"GOMP_SPINCOUNT": "2000"}),
        (0.1, {}, {}),
        (9.0, {"OMP_WAIT_POLICY": "active"}, {"OMP_WAIT_POLICY": "active"}),
        (9.0, {"GOMP_SPINCOUNT": "7"}, {"GOMP_SPINCOUNT": "7"}),
    ],
)
def test_it_follows_the_load(
    load: float, before: dict[str, str], after: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "getloadavg", lambda: (load, load, load))
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    wait_briefly_if_busy(before)
    assert before == after


def test_once_torch_is_loaded_it_is_too_late(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "getloadavg", lambda: (9.0, 9.0, 9.0))
    monkeypatch.setitem(sys.modules, "torch", os)
    environment: dict[str, str] = {}
    wait_briefly_if_busy(environment)
    assert environment == {}
