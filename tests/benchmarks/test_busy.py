"""The benchmark of a busy machine: others spin while they are to, and no longer."""

import os
from pathlib import Path

import pytest

from benchmarks import busy


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="asks Linux who runs")
def test_the_others_are_ended() -> None:
    def children() -> set[str]:
        found = Path(f"/proc/self/task/{os.getpid()}/children").read_text(encoding="utf-8").split()
        return set(found)

    before = children()
    with busy.spinning(2):
        assert len(children() - before) == 2
    assert children() == before


def test_rows_are_over_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([[1.0, 2.0, 3.0], [2.0], [3.0], [8.0]])  # the first warms up
    monkeypatch.setattr(busy, "tokens", lambda *given: next(times))
    monkeypatch.setattr(busy, "fill", lambda *given: None)
    monkeypatch.setattr(busy, "spinning", lambda count: busy.contextmanager(lambda: (yield))())
    from tests.models import tiny_model

    rows = busy.measure(tiny_model("llama"), "none", 100, (0, 1, 2), 1, 1)
    assert [(row["busy"], row["over_rest"]) for row in rows] == [(0, 1.0), (1, 1.5), (2, 4.0)]
