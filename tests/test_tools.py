"""The README table is made of what was measured, and the lock holds what `make` installs."""

from pathlib import Path

import pytest
from packaging.requirements import Requirement

from tools import lock, readme_table

MEASURED = {"correct": 9, "total": 10, "bits_per_byte": 1.25, "read_bytes_per_step": 3 * 2**20, "ms_per_token": 4.0}
RUN = {
    "policy": "ema",
    "context_tokens": 8192,
    "budget_tokens": 640,
    "compression": 12.8,
    "full": {**MEASURED, "fast_bytes": 5 * 2**20},
    "predicted": {**MEASURED, "correct": 8, "read_bytes_per_step": 2**18},
    "attention_recovery": 0.951,
    "recovery_ratio": None,
}


def test_table_holds_the_measured_figures() -> None:
    lines = readme_table.table([RUN]).splitlines()
    assert lines[2] == "| full cache | 8,192 | 9 of 10 | 1.250 | 3.00 MiB | 5.00 MiB | 4.0 | 100.0% | - |"
    assert lines[3] == "| `ema` | 640 | 8 of 10 | 1.250 | 0.25 MiB | - | 4.0 | 95.1% | - |"


def test_only_the_part_between_the_markers_changes() -> None:
    page = f"before\n{readme_table.BEGIN}\nold\n{readme_table.END}\nafter\n"
    new = readme_table.written(page, [RUN])
    assert new.startswith("before\n") and new.endswith("\nafter\n") and "old" not in new
    assert readme_table.written(new, [RUN]) == new


def test_missing_results_are_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(readme_table, "ROOT", tmp_path)
    monkeypatch.setattr(readme_table, "RESULTS", tmp_path / "demo.json")
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
