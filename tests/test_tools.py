"""The README table is made of what was measured, and the lock holds what `make` installs."""

import json
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from tools import lock, readme_table

COLUMN = {
    "policy": "full",
    "tokens_attended": 7001.4,
    "correct": 7,
    "total": 8,
    "kl": None,
    "bytes_per_step": 300 * 2**20,
    "fast_bytes": 320 * 2**20,
    "ms_per_token": 130.4,
}
RESULT = {
    "context_tokens": 7000,
    "text": "a part of A Book, by Somebody",
    "read_seconds": 35.2,
    "columns": [COLUMN, COLUMN | {"policy": "ema", "correct": 6, "kl": 0.1234, "bytes_per_step": 23.0 * 2**20}],
}


def test_table_holds_the_measured_figures() -> None:
    lines = readme_table.table(RESULT).splitlines()
    assert lines[0] == "7,000 tokens of A Book, by Somebody, read once in 35 s; 8 questions:"
    assert lines[4] == "| full cache | 7,001 | 7 of 8 | - | 300.0 MiB | 320.0 MiB | 130 |"
    assert lines[5] == "| `ema` | 7,001 | 6 of 8 | 0.123 | 23.0 MiB | 320.0 MiB | 130 |"


def timed(engine: str, weights: str, context: int, ms: float) -> dict[str, object]:
    return {"model": "smollm2", "engine": engine, "weights": weights, "context": context, "ms_per_token": ms}


SPEED = {"rows": [timed("attnpred", "int8", 1024, 27.8), timed("llama.cpp", "Q8_0", 4096, 42.2)]}


def test_the_table_of_speed_has_a_line_for_each_engine_and_a_dash_for_what_was_not_timed() -> None:
    lines = readme_table.speed(SPEED).splitlines()
    assert lines[0] == "|  | 1,024 tokens | 4,096 tokens |"
    assert lines[2:] == ["| attnpred, 8-bit weights | 28 | - |", "| llama.cpp, Q8_0 | - | 42 |"]


def test_only_the_parts_between_the_markers_change(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readme_table, "RESULTS", tmp_path)
    (tmp_path / "demo.json").write_text(json.dumps(RESULT), encoding="utf-8")
    (tmp_path / "rivals.json").write_text(json.dumps(SPEED), encoding="utf-8")
    marked = [f"<!-- {name}:begin -->\nold\n<!-- {name}:end -->" for name in ("speed", "table")]
    new = readme_table.written("\n".join(["before", marked[0], "between", marked[1], "after"]))
    assert new.startswith("before\n") and new.endswith("\nafter") and "\nbetween\n" in new and "old" not in new
    assert readme_table.written(new) == new


def test_missing_results_are_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(readme_table, "RESULTS", tmp_path)
    assert readme_table.main([]) == 2
    assert capsys.readouterr().err.count("\n") == 1


LOCKED = [
    "triton==3.9.0\n",
    "triton==3.9.0 ; sys_platform == 'linux'\n",
    "triton==3.9.0 ; sys_platform == 'linux' or (python_full_version >= '3.16' and platform_machine == 'x86_64')\n",
]


@pytest.mark.parametrize("line", LOCKED)
def test_triton_is_locked_for_one_kind_of_machine_whatever_else_its_condition_says(line: str) -> None:
    marker = Requirement(lock.narrowed(line).strip()).marker
    assert marker is not None
    for python in ("3.11", "3.16"):
        where = {"sys_platform": "linux", "python_full_version": python, "python_version": python}
        assert marker.evaluate(where | {"platform_machine": "x86_64"})
        assert not marker.evaluate(where | {"platform_machine": "aarch64"})


def test_other_lines_of_the_lock_stay_as_they_are() -> None:
    assert lock.narrowed("numpy==2.4.6 ; python_full_version >= '3.11'\n").endswith("; python_full_version >= '3.11'\n")
