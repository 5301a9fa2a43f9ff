"""Small samples of the kill, flip and soak matrices; `tools.reliability` runs large ones. Nothing may be wrong in any."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from attnpred.predictor import pretrained
from tests.reliability.flip import DAMAGE, flips
from tests.reliability.kill import KILLED, kills
from tests.reliability.outcome import Outcome
from tests.reliability.soak import ACTIONS, soak
from tests.reliability.things import THINGS, SavedPredictor

GROWTH = 20 << 20
"""Bytes that memory may grow by in the second half of a soak: the allocator's own, measured at 5 MB."""


def nothing_is_wrong(found: Iterable[Outcome]) -> None:
    assert [f"{outcome.what}, {wrong}" for outcome in found for wrong in outcome.wrong_ones] == []


@pytest.mark.slow
def test_after_a_kill_the_old_file_or_the_new_one_is_whole(tmp_path: Path) -> None:
    found = kills(tmp_path, 5)
    nothing_is_wrong(found)
    assert all(outcome.survived == outcome.injected > 0 for outcome in found)
    assert sum(outcome.midway for outcome in found) >= 3, "no kill came in the middle of a write"


@pytest.mark.slow
def test_damage_is_refused_or_changes_nothing(tmp_path: Path) -> None:
    found = flips(tmp_path, 3)
    nothing_is_wrong(found)
    assert len(found) == (len(THINGS) + 1) * len(DAMAGE) and all(outcome.injected == 3 for outcome in found)
    assert sum(outcome.refused for outcome in found) > sum(outcome.survived for outcome in found) > 0


@pytest.mark.slow
def test_many_calls_stay_right_and_leave_nothing(tmp_path: Path) -> None:
    found, middle, end = soak(tmp_path, 30)
    nothing_is_wrong(found)
    assert len(found) == len(ACTIONS) and sum(outcome.survived for outcome in found) == 30
    assert (end.threads, end.files_open, end.files_left) == (middle.threads, middle.files_open, 0)
    assert end.memory - middle.memory < GROWTH


@contextmanager
def in_place(path: Path, *_: Any) -> Iterator[int]:
    """Write as a program does that never heard of temporary files."""
    with path.open("wb") as file:
        yield file.fileno()


@pytest.mark.slow
def test_the_kill_matrix_can_fail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pretrained, "replacing", in_place)
    monkeypatch.setattr("tests.reliability.kill.KILLED", (SavedPredictor,))
    assert SavedPredictor in KILLED
    (found,) = kills(tmp_path, 8)
    assert found.refused + found.wrong > 0, "half a file was taken for a whole one"


@pytest.mark.slow
def test_the_flip_matrix_can_fail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pretrained, "check_value", lambda *_: "always the same")
    monkeypatch.setattr("tests.reliability.flip.THINGS", (SavedPredictor,))
    monkeypatch.setattr("tests.reliability.flip.DAMAGE", {"a bit flipped": DAMAGE["a bit flipped"]})
    assert any("with other weights or settings" in wrong for one in flips(tmp_path, 20) for wrong in one.wrong_ones)
