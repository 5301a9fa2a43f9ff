"""The file of rows: whatever its tail looks like after a kill, whole cells stay and the rest is cut off."""

import errno
import json
import math
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from attnpred.errors import ConfigError, OutputError
from attnpred.evaluation.rows import RowsFile, as_json, key_of, load_rows
from attnpred.report.rows import read_rows


def row(policy: str, task: str = "facts", text: str = "") -> dict[str, Any]:
    key = {"model": "demo", "policy": policy, "budget": 0.1, "task": task, "length": 9, "seed": 0, "settings": {}}
    return key | {
        "metric": "accuracy",
        "value": 1.0,
        "n": 1,
        "items": [{"name": "0", "value": 1.0, "text": f"é{text}"}],
    }


CELLS = [[row("full")], [row("ema", "recovery", "a"), row("ema", "recovery", "all")], [row("quest")]]


def whole(path: Path) -> list[str]:
    return [key_of(one) for one in load_rows(path)]


def written(path: Path, *cells: list[dict[str, Any]]) -> RowsFile:
    """Append cells as a run does, and return what the run knows."""
    with RowsFile(path).claimed() as file:
        for cell in cells:
            file.append(cell)
    return file


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(cut=st.integers(min_value=0, max_value=2000))
def test_a_file_cut_anywhere_keeps_its_whole_cells_and_takes_the_next(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "rows.jsonl"
    path.unlink(missing_ok=True)
    ends = [0]
    for cell in CELLS:
        written(path, cell)
        ends.append(path.stat().st_size)
    data = path.read_bytes()
    cut = min(cut, len(data))
    path.write_bytes(data[:cut])
    cells = max(i for i, end in enumerate(ends) if end <= cut + (i > 0))  # a row without its line end is whole
    expected = [key_of(one) for cell in CELLS[:cells] for one in cell]
    assert whole(path) == expected  # reading alone changes nothing
    assert path.stat().st_size == cut
    with RowsFile(path).claimed() as file:
        assert [key_of(one) for one in file.rows] == expected and path.read_bytes() == data[: ends[cells]]
        file.append(CELLS[0])
    lines = path.read_text(encoding="utf-8").splitlines()
    assert len([json.loads(line) for line in lines]) == len(expected) + 1


@pytest.mark.parametrize(
    "text",
    [
        "hello\n",
        '{"a": 1}\n',
        "[1, 2]\n",
        "no end",
        '{"model": "demo"}\n{"x"',
        "[" * 9999,
        "\xff\n",
        '{"model": NaN}\n',
    ],
    ids=range(8),
)
def test_a_file_of_something_else_is_refused_and_left_alone(tmp_path: Path, text: str) -> None:
    path = tmp_path / "notes.txt"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(ConfigError, match="whose line 1 is no row of attnpred eval, expected another --out file"):
        written(path, CELLS[0])
    assert path.read_bytes() == text.encode("latin-1")


WRONG = {
    "a line": "what is this\n",
    "a last line without an end": "my notes, not yet ended",
    "a row whose part is a word": json.dumps(row("ema") | {"part": "x", "parts": 1}) + "\n",
    "a row whose items are none": json.dumps(row("ema") | {"part": 0, "parts": 1, "items": [3]}) + "\n",
}


@pytest.mark.parametrize("more", WRONG.values(), ids=WRONG)
def test_a_wrong_line_is_named_and_nothing_is_cut(more: str, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    written(path, CELLS[0])
    with path.open("a") as other:
        other.write(more)
    before = path.read_bytes()
    with pytest.raises(ConfigError, match=r"whose line 2 is no row"):
        written(path, CELLS[2])
    assert path.read_bytes() == before


def test_one_run_at_a_time(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    with RowsFile(path).claimed() as file:
        for _ in range(2):
            with pytest.raises(
                ConfigError, match=r"to which another attnpred eval is writing, expected one run at a time"
            ):
                written(path, CELLS[0])
        file.append(CELLS[2])
    written(path, CELLS[0])
    assert [one["policy"] for one in load_rows(path)] == ["quest", "full"]


def test_a_disk_that_is_full_for_a_while_loses_no_cell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, write, room = tmp_path / "rows.jsonl", os.write, 0

    def into_what_is_left(fd: int, data: bytes) -> int:
        nonlocal room
        if not room:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        size = write(fd, data[:room])
        room -= size
        return size

    with RowsFile(path).claimed() as file:
        file.append(CELLS[0])
        monkeypatch.setattr(os, "write", into_what_is_left)
        room = 70  # for a part of the next cell
        file.append(CELLS[1])
        assert file.problem == "No space left on device" and whole(path) == [key_of(row("full"))]
        assert len(file.waiting().splitlines()) == 2 and len(file.rows) == 3
        room = 9999
        file.append(CELLS[2])
        assert file.problem is None and file.waiting() == ""
        room = 0
        file.append(CELLS[0])
    assert [json.loads(line)["policy"] for line in file.waiting().splitlines()] == ["full"]  # for the caller to show
    assert whole(path) == [key_of(one) for cell in CELLS for one in cell]


def test_what_cannot_be_written_is_told_before_anything_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path, kind in ((Path("/dev/full"), "a device"), (tmp_path / "pipe", "a pipe")):
        with pytest.raises(OutputError, match=f"got '{path}', which is {kind}, expected a file or a new name"):
            written(path)

    def full(fd: int, data: bytes) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(ConfigError, match="expected a file to write rows to: No space left on device"):
        written(tmp_path / "rows.jsonl")
    assert not (tmp_path / "rows.jsonl").exists()


def test_a_run_that_writes_nothing_leaves_no_file_and_takes_none_away(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    written(path)
    assert not path.exists()
    path.touch()
    written(path)
    assert path.exists()


def test_a_file_that_is_moved_away_during_a_run_is_made_again(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    with RowsFile(path).claimed() as file:
        file.append(CELLS[0])
        path.rename(tmp_path / "moved.jsonl")
        file.append(CELLS[2])
    assert whole(tmp_path / "moved.jsonl") == [key_of(row("full"))] and whole(path) == [key_of(row("quest"))]


def test_numbers_without_a_value_are_written_as_null(tmp_path: Path) -> None:
    written(tmp_path / "rows.jsonl", [as_json(row("ema") | {"hit_rate": math.nan, "by_head": [1.0, math.inf]})])
    [found] = load_rows(tmp_path / "rows.jsonl")
    assert found["hit_rate"] is None and found["by_head"] == [1.0, None]


def test_the_folder_must_exist(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="expected a file in a folder that exists"):
        RowsFile(tmp_path / "no" / "rows.jsonl")
    with pytest.raises(OutputError, match="which is a folder, expected a file or a new name"):
        written(tmp_path)


def test_a_changed_value_is_refused_and_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    written(path, *CELLS)
    changed = path.read_bytes().replace(b'"policy": "quest", "budget": 0.1', b'"policy": "quest", "budget": 0.3')
    path.write_bytes(changed)
    for read in (load_rows, written, lambda one: read_rows([one])):
        with pytest.raises(ConfigError, match=r"line 4 with values that were changed after it was measured"):
            read(path)
    assert path.read_bytes() == changed


def test_other_spaces_and_keys_in_another_order_change_nothing(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    rows = written(path, *CELLS).rows
    path.write_text("".join(json.dumps(dict(reversed(one.items())), separators=(",", ":")) + "\n" for one in rows))
    assert load_rows(path) == rows and len(read_rows([path])) == 4
    bare = [{name: value for name, value in one.items() if name != "check"} for one in rows]
    path.write_text("".join(json.dumps(one) + "\n" for one in bare))  # of another program
    assert load_rows(path) == bare
