"""Evidence on real models: the full cache decides what is compared, and what is left out is named."""

import json
from pathlib import Path
from typing import Any

import pytest

from attnpred.evaluation.plan import FULL
from attnpred.evaluation.tasks import TASKS, Example, Question
from tools import evidence_real, real_tables


def row(policy: str, task: str, value: float, budget: float = 1.0, low: float | None = None) -> dict[str, Any]:
    found = {
        "model": "smollm2",
        "length": 2048,
        "n": 4,
        "policy": policy,
        "task": task,
        "budget": budget,
        "lower_is_better": False,
        "value": value,
    }
    return found | {"interval": [value if low is None else low, value], "tokens_attended": 131.0}


ROWS = [
    row("full", "passkey", 1.0),
    row("full", "vt", 0.25, low=0.0),
    row("quest", "passkey", 0.5, 0.076923),
    row("quest", "vt", 0.5, 0.076923),
]


def test_a_task_at_chance_is_named_and_not_compared() -> None:
    shown = real_tables.full_cache(ROWS)
    assert "| smollm2 | vt | 2,048 | 4 | 0.25 | 0.00 to 0.25 | no: at chance |" in shown
    compared = real_tables.comparison(ROWS, "smollm2", 2048)
    assert "| `quest` | 1/13 | 131 | 0.50 |\n" in compared and "| `quest` | 1/13 | - |" in compared
    assert "vt" not in compared
    wide = real_tables.comparison([ROWS[0], ROWS[2] | {"interval": [0.25, 0.75]}], "smollm2", 2048)
    assert "| `quest` | 1/13 | 0.25 to 0.75 |" in wide


def test_nothing_is_compared_where_the_full_cache_can_do_nothing() -> None:
    assert real_tables.comparison(ROWS[1::2], "smollm2", 2048) == ""


def test_questions_of_all_compared_tasks_are_taken_together_in_pairs() -> None:
    def with_items(policy: str, task: str, values: list[float], budget: float = 0.076923) -> dict[str, Any]:
        items = [{"name": f"{i}/0", "value": value} for i, value in enumerate(values)]
        return row(policy, task, sum(values) / len(values), budget, low=0.1) | {"items": items}

    rows = [
        with_items("full", "passkey", [1, 1], 1.0),
        with_items("full", "needle", [1, 1], 1.0),
        with_items("full", "vt", [0, 0], 1.0) | {"interval": [0, 0]},
        with_items("ema", "passkey", [1, 0]),
        with_items("ema", "needle", [1, 1]),
        with_items("ema", "needle", [0, 0], 0.125),
        with_items("quest", "passkey", [1, 1]),
    ]
    shown = real_tables.pooled(rows, "smollm2", 2048)
    assert "all 2 compared tasks" in shown and "| `full` | 4 | 1.00 | - | +0.25 [" in shown
    assert "| `ema` | 4 | 0.75 | -0.25 [" in shown and "`quest`" not in shown, "not asked everything"
    assert real_tables.pooled(rows[:3], "smollm2", 2048) == real_tables.pooled(rows, "smollm2", 4096) == ""


def test_what_was_not_measured_is_named() -> None:
    assert "smollm2 needle at 2,048" in real_tables.not_run(ROWS)
    assert "passkey at 2,048" not in real_tables.not_run(ROWS)
    assert "smollm2 gsm8k at 2,048" in real_tables.not_run(ROWS) and "jsonl" not in real_tables.not_run(ROWS)


def test_the_full_cache_comes_first_and_then_budget_after_budget() -> None:
    plan = evidence_real.RUNS[0].plan()
    for cells in evidence_real.groups(plan):
        assert len({cell.task for cell in cells}) == 1
        assert [cell.variant.label == FULL for cell in cells] == [True] + [False] * (len(cells) - 1)
        budgets = [cell.budget for cell in cells[1:]]
        assert list(dict.fromkeys(budgets)) == list(plan.budgets) and budgets == sorted(budgets)


def test_chance_is_what_the_answers_to_another_document_score() -> None:
    task = TASKS["longbench"]()
    labels = {"dataset": "hotpotqa"}
    truths = ("a ship sank near the coast", "a ship sank in the harbour", "taxes rise")
    examples = [Example(str(i), (), (Question((), (truth,), 1, labels=labels),)) for i, truth in enumerate(truths)]
    scores = [task.score(truths[i - 2], examples[i].questions[0]) for i in range(3)]
    assert 0 < evidence_real.chance(task, examples) == pytest.approx(sum(scores) / 3)
    assert evidence_real.chance(task, examples[:1]) == 0
    above = row("full", "longbench", 0.3, low=0.2) | {"chance": 0.1}
    assert evidence_real.can(above) and not evidence_real.can(above | {"chance": 0.25})


def test_a_row_knows_the_file_of_its_task_by_name_alone(tmp_path: Path) -> None:
    run = evidence_real.Run("demo", 2048, "passkey gsm8k=gsm8k_test.jsonl", 2)
    assert [word.name for word in run.plan().tasks] == ["passkey"]
    (passkey, gsm8k) = run.plan(tmp_path).tasks
    assert gsm8k.word == "gsm8k=gsm8k_test.jsonl" and gsm8k.files == (str(tmp_path / "gsm8k_test.jsonl"),)
    assert not passkey.files and run.plan(tmp_path).wanted(gsm8k, 2048).file == tmp_path / "gsm8k_test.jsonl"


def test_a_folder_without_the_files_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        evidence_real.main(["--files", str(tmp_path), "--out", str(tmp_path / "rows.jsonl")])
    assert ended.value.code == 2 and "expected gsm8k_test.jsonl in it" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize(("low", "policies"), [(-1.0, ["full", "streaming"]), (1.0, ["full"])])
def test_policies_run_only_where_the_full_cache_is_above_chance(
    low: float, policies: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evidence_real, "chance", lambda task, examples: low)
    monkeypatch.setattr(evidence_real, "RUNS", (evidence_real.Run("demo", 200, "passkey", 1, "streaming"),))
    out = tmp_path / "rows.jsonl"
    for _ in range(2):  # the second time nothing is measured again
        assert evidence_real.main(["--out", str(out)]) == 0
    assert [json.loads(line)["policy"] for line in out.read_text().splitlines()] == policies
    assert evidence_real.main(["--out", str(tmp_path / "no.jsonl"), "--minutes", "0"]) == 1
