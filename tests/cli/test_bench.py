"""`attnpred bench` runs the repository's benchmarks, and its last line is the JSON that others rely on."""

import json
from pathlib import Path

import pytest

from attnpred.cli import main as cli


def test_an_unknown_benchmark_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", "speed"]) == cli.USER_ERROR
    assert "got benchmark 'speed', expected one of decode, selection, offload, memory" in capsys.readouterr().err


@pytest.mark.slow
def test_offload_prints_its_rows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small = ["--context", "2048", "--layers", "1", "--rounds", "1", "--steps", "3", "--demo-steps", "3"]
    assert cli.main(["bench", "offload", "--json", "--folder", str(tmp_path), *small]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    rows = {row["variant"]: row for row in found["rows"] if row["shape"] == "1b"}
    assert {"memory", "disk", "disk-full"} <= set(rows)
    for row in rows.values():
        assert {"context", "ms_per_token", "bytes_per_token", "hit_rate", "exposed_wait_ms"} <= set(row)
    assert (
        rows["memory"]["bytes_per_token"] == 0 < rows["disk"]["bytes_per_token"] < rows["disk-full"]["bytes_per_token"]
    )
    assert rows["disk-full"]["bytes_per_token"] == 128 * 16 * 2 * 8 * 64 * 2  # every block of the context, once
    assert list(tmp_path.iterdir()) == []  # no file is left
