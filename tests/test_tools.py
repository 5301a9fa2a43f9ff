"""The README table is made of what was measured."""

from pathlib import Path

import pytest

from tools import readme_table

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
