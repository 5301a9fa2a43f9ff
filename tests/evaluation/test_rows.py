"""The file of rows: whatever its tail looks like after a kill, whole cells stay and the rest is cut off."""

import json
import threading
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from attnpred.errors import ConfigError
from attnpred.evaluation.rows import RowsFile, key_of, load_rows


def row(policy: str, task: str = "facts", text: str = "") -> dict[str, Any]:
    key = {"model": "demo", "policy": policy, "budget": 0.1, "task": task, "length": 9, "seed": 0, "settings": {}}
    return key | {"metric": "accuracy", "value": 1.0, "n": 1, "items": [{"name": "0", "text": f"é{text}"}]}


CELLS = [[row("full")], [row("ema", "recovery", "a"), row("ema", "recovery", "all")], [row("quest")]]


def whole(path: Path) -> list[str]:
    return [key_of(one) for one in load_rows(path)]


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(cut=st.integers(min_value=0, max_value=2000))
def test_a_file_cut_anywhere_keeps_its_whole_cells_and_takes_the_next(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "rows.jsonl"
    path.unlink(missing_ok=True)
    file = RowsFile(path)
    ends = [0]
    for cell in CELLS:
        file.append(cell)
        ends.append(path.stat().st_size)
    data = path.read_bytes()
    cut = min(cut, len(data))
    path.write_bytes(data[:cut])
    cells = max(i for i, end in enumerate(ends) if end <= cut)
    expected = [key_of(one) for cell in CELLS[:cells] for one in cell]
    assert whole(path) == expected  # reading alone changes nothing
    assert path.stat().st_size == cut
    assert [key_of(one) for one in file.open()] == expected and path.stat().st_size == ends[cells]
    file.append(CELLS[0])
    lines = path.read_text(encoding="utf-8").splitlines()
    assert len([json.loads(line) for line in lines]) == len(expected) + 1


def test_a_torn_line_of_another_process_is_cut_off_before_the_next_row(tmp_path: Path) -> None:
    file = RowsFile(tmp_path / "rows.jsonl")
    file.append(CELLS[0])
    with file.path.open("ab") as other:
        other.write(b'{"model": "demo", "pol')
    file.append(CELLS[2])
    assert [one["policy"] for one in load_rows(file.path)] == ["full", "quest"]


@pytest.mark.parametrize("text", ["hello\n", '{"a": 1}\n', "[1, 2]\n", "no end", '{"model": "demo"}\n{"x"'])
def test_a_file_of_something_else_is_refused_and_left_alone(tmp_path: Path, text: str) -> None:
    path = tmp_path / "notes.txt"
    path.write_text(text, encoding="utf-8")
    for act in (RowsFile(path).open, lambda: RowsFile(path).append(CELLS[0])):
        with pytest.raises(ConfigError, match="whose line 1 is no row of attnpred eval, expected another --out file"):
            act()
    assert path.read_text(encoding="utf-8") == text


def test_a_wrong_line_is_named(tmp_path: Path) -> None:
    file = RowsFile(tmp_path / "rows.jsonl")
    file.append(CELLS[0])
    with file.path.open("a") as other:
        other.write("what is this\n")
    with pytest.raises(ConfigError, match=r"whose line 2 is no row"):
        file.open()


def test_writers_at_once_lose_nothing(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"

    def write(name: str) -> None:
        for i in range(20):
            RowsFile(path).append([row(f"{name}{i}", text="x" * 3000), row(f"{name}{i}")])

    threads = [threading.Thread(target=write, args=(name,)) for name in "abcd"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    rows = load_rows(path)
    assert sorted(one["policy"] for one in rows) == sorted(f"{n}{i}" for n in "abcd" for i in range(20) for _ in "12")
    assert all(one["policy"] == two["policy"] for one, two in zip(rows[::2], rows[1::2], strict=True))


def test_the_folder_must_exist(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="expected a file in a folder that exists"):
        RowsFile(tmp_path / "no" / "rows.jsonl")
    with pytest.raises(ConfigError, match="expected a file to write rows to: Is a directory"):
        RowsFile(tmp_path).open()
