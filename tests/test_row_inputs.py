"""Rows that were written before rows named their inputs get them where they agree with today's documents, and only there."""

import json
from pathlib import Path
from typing import Any

import pytest

from attnpred.row_check import require_unchanged, with_check
from tools import row_inputs

RESULTS = Path(__file__).resolve().parents[1] / "docs" / "results"
SETTINGS = {"documents": 1, "steps": 8, "limit": None, "texts": [], "chat": False, "recovery": False, "config": {}}


def row(**more: Any) -> dict[str, Any]:
    key = {"model": "demo", "policy": "ema", "budget": 0.1, "task": "facts1", "length": 300, "seed": 3}
    return key | {"settings": SETTINGS, "value": 1.0, "n": 1} | more


def answered(text: str, value: float, **labels: Any) -> dict[str, Any]:
    [example] = row_inputs.made("demo", "facts1", 300, 3, json.dumps(SETTINGS, sort_keys=True), None)
    labels = dict(example.questions[0].labels) | labels
    return row(items=[{"name": "0/0", "value": value, "labels": labels, "text": text}])


def right_answer() -> str:
    [example] = row_inputs.made("demo", "facts1", 300, 3, json.dumps(SETTINGS, sort_keys=True), None)
    return f" {example.questions[0].answers[0]}"


def converted(path: Path, *rows: dict[str, Any]) -> tuple[int, list[dict[str, Any]]]:
    path.write_text("".join(json.dumps(one) + "\n" for one in rows), encoding="utf-8")
    code = row_inputs.main([str(path)])
    return code, [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_a_row_that_agrees_gets_its_inputs_and_keeps_the_rest(tmp_path: Path) -> None:
    old = answered(right_answer(), 1.0)
    code, (bare, checked) = converted(tmp_path / "rows.jsonl", old, with_check(old))
    assert code == 0 and len(bare["inputs"]) == 16 and bare == old | {"inputs": bare["inputs"]}
    assert checked["inputs"] == bare["inputs"] and "check" in checked
    require_unchanged(checked, "here")
    code, again = converted(tmp_path / "rows.jsonl", bare, checked)
    assert code == 0 and again == [bare, checked]


def test_a_row_that_does_not_agree_stays_as_it_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    others = [
        answered(right_answer(), 0.0),
        answered(" no number", 1.0),
        answered(right_answer(), 1.0, depth=2.0),
        row(items=[{"name": "7/0", "value": 1.0, "labels": {}, "text": ""}]),
        row(task="gsm8k=no-such.jsonl"),
        {"context": 1},
    ]
    code, found = converted(tmp_path / "rows.jsonl", *others)
    told = capsys.readouterr().err.splitlines()
    assert code == 1 and found == others and len(told) == len(others)
    assert "rows.jsonl line 1 stays as it is: got a row of facts1 at 300 on other documents than today's" in told[0]
    assert "expected that file: name its folder with --files" in told[4] and "without its settings" in told[5]


@pytest.mark.slow
def test_what_our_rows_were_measured_on_is_what_the_tasks_make_today() -> None:
    """Whatever the package becomes. A real model's tokenizer has to be fetched: its rows are left out here."""
    seen = {}
    for path in sorted(RESULTS.glob("*.jsonl")):
        for line in path.read_text(encoding="utf-8").splitlines():
            found = json.loads(line)
            if found.get("model") == "demo" and "inputs" in found:
                bare = {name: value for name, value in found.items() if name not in ("inputs", "items")}
                words = json.dumps(
                    [found[name] for name in ("task", "length", "seed")] + [found["settings"] | {"config": {}}]
                )
                seen[words] = (
                    (found["inputs"], row_inputs.named(bare, None)["inputs"]) if words not in seen else seen[words]
                )
                assert found["inputs"] == seen[words][1], (path.name, words)
    assert len(seen) > 8
