"""The grid: which cells there are, one row each with everything that made it, and a kill that loses at most one."""

import copy
import json
import math
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from attnpred.cli.main import main
from attnpred.config import CacheConfig
from attnpred.errors import ConfigError
from attnpred.evaluation.grid import Grid, attempt, left_over, run_cells
from attnpred.evaluation.inputs import with_inputs
from attnpred.evaluation.plan import Plan, parse_task, parse_tasks
from attnpred.evaluation.rows import RowsFile, load_rows
from attnpred.evaluation.suites import SUITES
from attnpred.evaluation.tasks import TASKS
from attnpred.evaluation.tasks.base import Item, Measured
from attnpred.evaluation.variants import parse_variant
from attnpred.hf import load_model
from attnpred.policies import POLICIES

CONFIG = CacheConfig(budget=1.0, num_sink_tokens=16, recent_window=16, dense_layers=0)
PROMISED = (
    "model policy budget task length metric value n seed recovery recovery_ratio fast_bytes ms_per_token interval items "
    "against_full bytes_per_step slow_bytes compression tokens_attended hit_rate prefill_seconds granularity kind versions "
    "commit machine dtype config policy_fields seconds settings inputs"
).split()


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    file = tmp_path_factory.mktemp("texts") / "mill.txt"
    lines = [f"The mill number {i} stood by the river, and miller {i * 7} was old." for i in range(120)]
    file.write_text(" ".join(lines), encoding="utf-8")
    return str(file)


def plan(text: str, tasks: str, policies: str = "full streaming", **settings: Any) -> Plan:
    usual = {"budgets": (0.4, 0.6), "lengths": (300,), "documents": 1, "steps": 8, "texts": (text,), "config": CONFIG}
    variants = tuple(map(parse_variant, policies.split()))
    return Plan(model="demo", tasks=parse_tasks(tasks), variants=variants, **(usual | settings))


@pytest.fixture(scope="module")
def demo() -> tuple[Any, Any]:
    return load_model("demo", device="cpu")


def described(found: Plan) -> list[tuple[str, int, str, float]]:
    return [(cell.task.word, cell.length, cell.variant.label, cell.budget) for cell in found.cells()]


def test_rows_that_were_measured_under_other_defaults_are_found_again(text: str) -> None:
    """The rows of docs/results name their settings as they did when the defaults were others."""
    results = Path(__file__).resolve().parents[2] / "docs" / "results"
    made = plan(text, "facts4", config=CacheConfig(budget=1.0))
    for name, config in (
        ("policies", made.config),
        ("needle", replace(made.config, recent_window=16)),
        ("offloaded", replace(made.config, offload="cpu")),
    ):
        with (results / f"{name}.jsonl").open(encoding="utf-8") as file:
            first = json.loads(file.readline())
        assert replace(made, config=config).settings()["config"] == first["settings"]["config"]


def test_the_full_cache_comes_first_once_for_each_task_and_length(text: str) -> None:
    found = described(plan(text, "facts1,recovery", "ema full", lengths=(300, 400)))
    assert found[:3] == [("facts1", 300, "full", 1.0), ("facts1", 300, "ema", 0.4), ("facts1", 300, "ema", 0.6)]
    assert found[3][:3] == ("facts1", 400, "full")
    assert [cell[2:] for cell in found[6:]] == 2 * [("ema", 0.4), ("ema", 0.6)]  # what is replayed needs no full cache
    assert ("full", 1.0) not in [cell[2:] for cell in described(plan(text, "facts1", "ema", full=False))]
    assert ("full", 1.0) in [cell[2:] for cell in described(plan(text, "facts1", "ema"))]


def test_every_task_and_policy_of_a_suite_exists() -> None:
    for suite in SUITES.values():
        assert all(task.name in TASKS for task in parse_tasks(suite.tasks))
        assert all(word in POLICIES for word in suite.policies.split(","))


MISTAKES = {
    "chess": "got task 'chess', expected one of facts1",
    "qa": "got task 'qa', expected its file: write qa=FILE",
    "qa=/no/such": "got task 'qa=/no/such', expected a file that exists: there is no '/no/such'",
    "facts1=x": "got task 'facts1=x', expected no file: facts1 makes its own documents",
    "perplexity=/no/such": "expected a file that exists",
}


def test_a_field_of_a_policy_is_a_number_that_can_be_counted_with() -> None:
    with pytest.raises(ConfigError, match="got window=1000000000000, expected a whole number of at most 2147483647"):
        parse_variant("snapkv:window=1000000000000")


@pytest.mark.parametrize("word", MISTAKES)
def test_a_wrong_task_is_told(word: str) -> None:
    with pytest.raises(ConfigError, match=MISTAKES[word]):
        parse_task(word)


def test_rows_say_what_made_them_and_compare_item_by_item(demo: tuple[Any, Any], text: str, tmp_path: Path) -> None:
    file = RowsFile(tmp_path / "rows.jsonl")
    made = plan(text, "facts4,perplexity,agreement", recovery=True, budgets=(0.4,))
    grid = Grid(made, *demo)
    grid.check_policies()
    failed = []
    with file.claimed():
        run_cells(grid, file, made.cells(), lambda cell, why: failed.append(why))
    assert failed == [None] * 6
    rows = load_rows(file.path)
    assert len(rows) == 6 and left_over(grid.plan, rows) == []
    for full, row in zip(rows[::2], rows[1::2], strict=True):
        assert set(PROMISED) <= set(full) == set(row)
        assert (full["policy"], row["policy"], full["against_full"]) == ("full", "streaming", None)
        values = [{item["name"]: item["value"] for item in one["items"]} for one in (full, row)]
        assert list(values[0]) == list(values[1]) and row["n"] == len(values[1]) == row["against_full"]["n"]
        paired = [values[1][name] - values[0][name] for name in values[0]]
        assert row["against_full"]["difference"] == pytest.approx(sum(paired) / len(paired), abs=1e-9)
        low, high = row["against_full"]["interval"]
        assert low - 1e-9 <= row["against_full"]["difference"] <= high + 1e-9
        assert row["value"] == pytest.approx(sum(values[1].values()) / row["n"])
        assert (full["recovery"], full["compression"], full["granularity"]) == (1.0, 1.0, "all")
        assert 0 < row["recovery"] < 1 and row["compression"] > 1.5 and row["granularity"] == "block 16"
        assert row["bytes_per_step"] < full["bytes_per_step"] and row["config"]["budget"] == 0.4
    kl, same = rows[5], rows[4]
    assert kl["metric"] == "kl_per_token" and kl["lower_is_better"] and kl["value"] > 1e-4
    assert same["value"] == pytest.approx(0, abs=1e-5) and same["items"][0]["labels"]["first_divergence"] is None
    # an answer is there, cut; other settings are other rows
    assert all(item["text"] and len(item["text"]) <= 200 for item in rows[0]["items"])
    for other in (plan(text, "facts4", seed=1, recovery=True), plan(text, "facts4", recovery=False)):
        assert len(left_over(with_inputs(other, demo[1]), rows)) == 3


def test_a_cell_is_compared_with_the_full_row_of_an_earlier_run(
    demo: tuple[Any, Any], text: str, tmp_path: Path
) -> None:
    path, made, told = tmp_path / "rows.jsonl", plan(text, "facts4"), []
    full, sparse, *_ = made.cells()
    [alone] = Grid(made, *demo).rows(sparse)
    assert alone["against_full"] is None
    for cell in (full, sparse):
        with RowsFile(path).claimed() as file:
            run_cells(Grid(made, *demo), file, [cell], lambda cell, why: told.append(why))
    row = load_rows(path)[1]
    assert told == [None, None] and row["against_full"]["n"] == row["n"] and row["items"] == alone["items"]


def test_rows_of_packed_weights_are_other_rows(demo: tuple[Any, Any], text: str) -> None:
    pytest.importorskip("numba")
    values = []
    for weights in (None, "int4"):
        made = plan(text, "perplexity", "full", weights=weights)
        grid = Grid(made, copy.deepcopy(demo[0]), demo[1])
        (row,) = grid.rows(made.cells()[0])
        values.append(row["value"])
        assert row["settings"].get("weights") == weights
        plain = with_inputs(plan(text, "perplexity", "full"), demo[1])
        assert bool(left_over(plain, [row])) == (weights is not None)
    assert values[0] != values[1] == pytest.approx(values[0], rel=0.2)


def test_a_value_that_is_no_number_is_told_and_no_row(demo: tuple[Any, Any], text: str) -> None:
    made = plan(text, "facts4")
    grid = Grid(made, *demo)
    nothing = Measured([Item("0", math.inf)])
    [cell, *_] = made.cells()
    grid.examples(cell)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(cell.task.make()), "measure", lambda *given: [nothing])
        rows, why = attempt(grid, cell)
    assert (
        rows == [] and why is not None and why.startswith("got accuracy inf from task 'facts4', expected a finite one")
    )


COMMAND = "import sys; from attnpred.cli.main import main; raise SystemExit(main(sys.argv[1:]))"


def arguments(text: str, out: Path, *more: str) -> list[str]:
    return [
        *("eval", "demo", "--tasks", "facts4,perplexity,recovery", "--policies", "full,streaming,ema", "--budgets", "0.4,0.6"),
        *("--lengths", "300", "--documents", "2", "--steps", "12", "--texts", text, "--recent-window", "16"),
        *("--out", str(out), *more),
    ]  # fmt: skip


def stable(path: Path) -> list[dict[str, Any]]:
    """Return the rows without what is measured anew each time."""
    clocks = {"ms_per_token", "prefill_seconds", "seconds", "machine", "commit", "check"}
    return [{key: value for key, value in row.items() if key not in clocks} for row in load_rows(path)]


@pytest.mark.slow
def test_a_killed_run_goes_on_and_nothing_is_lost_or_done_twice(text: str, tmp_path: Path) -> None:
    whole, killed = tmp_path / "whole.jsonl", tmp_path / "killed.jsonl"
    assert main(arguments(text, whole)) == 0
    rows = 0
    for wanted in (1, 4, 9):
        process = subprocess.Popen(
            [sys.executable, "-c", COMMAND, *arguments(text, killed)],
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=os.environ | {"OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        until = time.monotonic() + 120
        while process.poll() is None and time.monotonic() < until:
            if killed.exists() and killed.read_bytes().count(b"\n") >= wanted:
                break
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        process.wait()
        found = len(load_rows(killed))
        assert found >= max(wanted - 1, rows), "a row that was there is gone"
        rows = found
    with killed.open("ab") as file:  # as if the last kill had come in the middle of a write
        file.write(whole.read_bytes().splitlines()[rows][:40])
    before = killed.read_bytes()[:-40]
    assert main(arguments(text, killed)) == 0
    assert killed.read_bytes().startswith(before)
    assert stable(killed) == stable(whole)
    size = killed.stat().st_size
    assert main(arguments(text, killed)) == 0 and killed.stat().st_size == size  # nothing left to do


@pytest.mark.slow
def test_processes_on_several_devices_write_the_same_rows(text: str, tmp_path: Path) -> None:
    one, two = tmp_path / "one.jsonl", tmp_path / "two.jsonl"
    assert main(arguments(text, one)) == 0
    assert main(arguments(text, two, "--devices", "cpu,cpu")) == 0
    key = lambda row: json.dumps([row[name] for name in ("task", "policy", "budget", "part")])  # noqa: E731
    ours, theirs = sorted(stable(one), key=key), sorted(stable(two), key=key)
    assert [key(row) for row in ours] == [key(row) for row in theirs]
    for left, right in zip(ours, theirs, strict=True):
        assert left["value"] == pytest.approx(right["value"], abs=1e-6)
        assert (left["against_full"] is None) == (right["against_full"] is None)


def test_a_bug_in_one_cell_is_shown_and_costs_no_other(capsys: pytest.CaptureFixture[str]) -> None:
    class Broken:
        def rows(self, cell: object, full: object) -> None:
            raise ZeroDivisionError("of a policy")

    assert attempt(Broken(), None) == ([], "ZeroDivisionError, a bug: see above")  # type: ignore[arg-type]
    assert "ZeroDivisionError: of a policy" in capsys.readouterr().err
