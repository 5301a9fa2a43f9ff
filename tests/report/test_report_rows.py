"""Rows are read as they were written, a wrong one is one line that names its place, and rows alike stand together."""

import json
from pathlib import Path
from typing import Any

import pytest

from attnpred.errors import ConfigError
from attnpred.report.places import Column, places
from attnpred.report.rows import Row, read_rows

DATA = Path(__file__).parent / "data" / "rows.jsonl"


def raw(**other: Any) -> dict[str, Any]:
    return {"model": "m", "policy": "ema", "budget": 0.25, "task": "t", "metric": "accuracy", "value": 0.5, "length": 64, **other}  # fmt: skip


def write(path: Path, *rows: Any, end: str = "\n") -> Path:
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows) + end, encoding="utf-8")
    return path


def read(path: Path, *rows: Any) -> list[Row]:
    return read_rows([write(path / "rows.jsonl", *rows)])


def test_the_grid_s_rows_are_read() -> None:
    rows = read_rows([DATA])
    kept = [json.loads(line) for line in DATA.read_text(encoding="utf-8").splitlines()]
    assert [row.raw for row in rows] == kept
    assert [row.value for row in rows] == [one["value"] for one in kept]
    assert {row.is_full for row in rows} == {True, False} and any(row.lower_is_better for row in rows)
    assert all(row.is_full or row.against is not None for row in rows)


MISTAKES: dict[str, tuple[Any, str]] = {
    "no policy": ({k: v for k, v in raw().items() if k != "policy"}, "line 2 without 'policy', expected the keys model, policy"),
    "no budget": (raw(budget=None), "line 2 without 'budget', expected one for policy 'ema' (only full has none)"),
    "value a word": (raw(value="0.5"), 'line 2 with value="0.5", expected a finite number'),
    "value true": (raw(value=True), "line 2 with value=true, expected a finite number"),
    "n true": (raw(n=True), "line 2 with n=true, expected a whole number"),
    "text a number": (raw(text=3), "line 2 with text=3, expected a text"),
    "three ends": (raw(interval=[0, 1, 2]), "line 2 with interval=[0, 1, 2], expected two numbers"),
    "labels a list": (raw(items=[{"value": 1, "labels": [1]}]), "line 2 with items[0] = {"),
    "config a word": (raw(config="x"), 'line 2 with config="x", expected an object'),
    "value NaN": (raw(value=float("nan")), "line 2 that is not JSON, expected one object: run `attnpred eval` again if it was cut short (NaN is no finite"),
    "value null": (raw(value=None, n=3), "line 2 with value=null, expected a finite number"),
    "policy empty": (raw(policy=" "), 'line 2 with policy=" ", expected a text'),
    "budget 0": (raw(budget=0), "line 2 with budget=0, expected a share up to 1 or a number of tokens"),
    "length a share": (raw(length=0.5), "line 2 with length=0.5, expected a whole number of tokens"),
    "interval turned round": (raw(interval=[1, 0]), "line 2 with interval=[1, 0], expected two numbers, the lower one first"),
    "a bare difference": (raw(against_full={"difference": 0.1}), "the report shows none without the other"),
    "negative time": (raw(ms_per_token=-1), "line 2 with ms_per_token=-1, expected a number of at least 0"),
    "an item without value": (raw(items=[{"name": "a"}]), "line 2 with items[0] = {\"name\": \"a\"}, expected an object with a"),
    "a list": ([1], "line 2 with [1], expected an object"),
    "400 digits": ('{"value": 1' + 400 * "0" + "}", "is no finite number of at most 64 bits"),
    "half a letter": (r'{"model": "\ud800"}', "half of a letter, \\ud800, in a text"),
    "nested": ("[" * 9999, "line 2 with more than 64 levels of JSON"),
    "torn": ('{"model": "m"', "line 2 that is not JSON, expected one object"),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_wrong_row_is_one_line_with_its_place(mistake: str, tmp_path: Path) -> None:
    row, message = MISTAKES[mistake]
    with pytest.raises(ConfigError) as caught:
        read(tmp_path, raw(), row)
    assert str(caught.value).startswith(f"got {tmp_path / 'rows.jsonl'} line 2 ") and message in str(caught.value)


def test_files_that_hold_no_rows(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"got no rows in .*, expected at least one: write some with `attnpred eval`"):
        read(tmp_path, "")
    with pytest.raises(ConfigError, match="No such file"):
        read_rows([tmp_path / "none.jsonl"])
    (tmp_path / "bytes").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="no UTF-16"):
        read_rows([tmp_path / "bytes"])


def test_a_torn_tail_is_left_out_and_told(tmp_path: Path) -> None:
    said: list[str] = []
    path = write(tmp_path / "a", raw(), raw(value=1), '{"model": "m", "pol', end="")
    assert len(read_rows([path], said.append)) == 2 and said == [f"{path} line 3 has no end and is left out"]
    assert len(read_rows([write(tmp_path / "b", raw(), raw(value=1), end="")], said.append)) == 2 and len(said) == 1


def test_lines_end_at_newlines_alone_and_a_mark_is_no_part_of_them(tmp_path: Path) -> None:
    text = json.dumps(raw(model="one\u2028two\x85three"), ensure_ascii=False) + "\n"
    (tmp_path / "a").write_bytes(b"\xef\xbb\xbf" + text.encode())
    (tmp_path / "b").write_bytes(text.encode("utf-16"))
    for name in "ab":
        (row,) = read_rows([tmp_path / name])
        assert row.model == "one\u2028two\x85three"


def test_a_line_given_twice_counts_once(tmp_path: Path) -> None:
    path = write(tmp_path / "a", raw(), raw(value=1))
    assert len(read_rows([path, path])) == 2


def test_places_hold_rows_that_may_be_compared(tmp_path: Path) -> None:
    rows = read(
        tmp_path, raw(), raw(budget=32), raw(policy="full", budget=None, value=1), raw(length=128), raw(text="book"),
        raw(task="u", lower_is_better=True), raw(task="u", policy="quest", value=0.1, lower_is_better=True), raw(task="u", policy="oracle", value=0),
        raw(value=None, n=0, policy="h2o"),
    )  # fmt: skip
    found = places(rows)
    assert [place.name for place in found] == ["t, 64 tokens, m", "t, 128 tokens, m", "t, text book, 64 tokens, m", "u, 64 tokens, m"]  # fmt: skip
    first, last = found[0], found[-1]
    assert first.full is not None and first.full.value == 1 and first.series == ["ema"]
    assert [column.words for column in first.columns] == ["32 tokens", "25 %"]  # half of it, then a quarter
    assert [name for name, _ in last.rivals(Column(0.25))] == ["quest", "ema"]  # lower first, without the oracle


def test_rows_that_differ_in_a_setting_are_series_of_their_own(tmp_path: Path) -> None:
    rows = read(
        tmp_path, raw(config={"block_size": 8}), raw(config={"block_size": 16}), raw(config={"block_size": 16}, value=0.7),
        raw(budget=0.5, config={"block_size": 16}), raw(policy="quest"),
    )  # fmt: skip
    (place,) = places(rows)
    assert place.series == ["ema block_size=8", "ema block_size=16", "quest"]
    assert place.cells["ema block_size=16", Column(0.25)].value == 0.7 and place.hidden == 1
    assert ("ema block_size=16", Column(0.5)) in place.cells
