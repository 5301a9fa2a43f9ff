"""The page of policies says what the rows say, and judges published orderings by their intervals."""

from pathlib import Path
from typing import Any

import pytest

from tools import evidence, evidence_tables, policy_tables
from tools.policy_claims import CLAIMS, compared, verdict

CONFIG = {"num_sink_tokens": 16, "recent_window": 32}
COMMON: dict[str, Any] = {
    "model": "demo", "length": 4096, "seed": 5, "metric": "accuracy", "kind": "retrieval", "granularity": "block 16",
    "fast_bytes": 2**20, "bytes_per_step": 2048.0, "ms_per_token": 3.0, "recovery_ratio": 0.9, "config": CONFIG,
    "versions": {"torch": "2", "transformers": "5"}, "commit": "abc", "against_full": None,
}  # fmt: skip


def row(policy: str, budget: float, right: list[int], task: str = "facts4", **own: Any) -> dict[str, Any]:
    items = [{"name": f"{i}/0", "value": float(x), "labels": {}} for i, x in enumerate(right)]
    mean = sum(right) / len(right)
    return (
        COMMON
        | {"policy": policy, "budget": budget, "task": task, "items": items, "value": mean, "n": len(right)}
        | own
    )


GOOD, BAD = [1] * 18 + [0, 0], [0] * 17 + [1, 1, 1]


def test_an_ordering_is_judged_by_its_paired_interval() -> None:
    rows = [row("quest", 0.1, GOOD), row("h2o", 0.1, BAD), row("ema", 0.1, GOOD)]
    assert verdict(compared(rows, "quest", "h2o")) == "reproduces"
    assert verdict(compared(rows, "h2o", "quest")) == "reversed"
    assert verdict(compared(rows, "quest", "ema")) == "cannot be told apart"
    assert verdict(compared(rows, "quest", "tidal")) == "not measured"


def test_large_budgets_and_other_metrics_judge_nothing() -> None:
    rows = [row("quest", 0.25, GOOD), row("h2o", 0.25, BAD)]
    rows += [row("quest", 0.1, GOOD, metric="bits_per_byte"), row("h2o", 0.1, BAD, metric="bits_per_byte")]
    assert compared(rows, "quest", "h2o") is None


def test_items_are_paired_within_a_budget_and_a_task() -> None:
    rows = [row("quest", 0.1, GOOD), row("h2o", 0.05, BAD), row("h2o", 0.1, BAD, task="hops")]
    assert compared(rows, "quest", "h2o") is None


def test_a_document_is_one_sample_whatever_is_asked_of_it() -> None:
    rows = [row(policy, budget, right) for policy, right in (("quest", GOOD), ("h2o", BAD)) for budget in (0.1, 0.05)]
    once, twice = compared(rows[::2], "quest", "h2o"), compared(rows, "quest", "h2o")
    assert once == twice and once is not None and once["n"] == len(GOOD)


def test_a_table_holds_every_policy_best_first_and_the_full_cache() -> None:
    rows = [row("h2o", 0.125, BAD), row("quest", 0.125, GOOD), row("full", 1.0, [1] * 20), row("ema", 0.25, GOOD)]
    offloaded = {("quest", 0.125): {"fast_bytes": 3 * 2**19, "slow_bytes": 2**21, "moved_bytes_per_step": 512.0}}
    lines = policy_tables.budget_table(rows, 0.125, offloaded, {"quest": {"ms_per_token": 7.25}}).splitlines()[2:]
    assert [line.split("`")[1] for line in lines] == ["full", "quest", "h2o"]
    assert lines[1].endswith("| 2 | 1.50 | 2.00 | 0 | 7.2 |") and "| 0.90 |" in lines[1]


def test_turns_are_paired_by_document() -> None:
    items = [
        {"name": f"{d}/{t}", "value": float(t == 0), "labels": {"turn": t + 1}} for d in range(3) for t in range(2)
    ]
    made = row("snapkv", 0.1, [1], task="facts_turns") | {"items": items}
    assert "| `snapkv` | 1.00 | 0.00 | -1.00 [-1.00, -1.00] |" in policy_tables.turns([made])


def test_the_largest_compression_is_one_that_loses_less_than_half_a_percent() -> None:
    rows = []
    for budget, right, bits, times in ((1.0, [1] * 20, 1.6, 1.0), (0.1, [1] * 20, 1.607, 9.0), (0.05, GOOD, 1.6, 18.0)):
        policy = "full" if budget == 1 else "predicted"
        rows.append(row(policy, budget, right, compression=times, against_full={"difference": 0.0, "interval": [0, 0]}))
        rows.append(row(policy, budget, right, task="perplexity") | {"value": bits, "metric": "bits_per_byte"})
    shown = evidence_tables.compression(rows)
    assert shown.short == "9.0 times" and "| 18.0 times | -10.0% | +0.00 [+0.00, +0.00] | +0.00% |" in shown.table
    assert evidence_tables.compression([x for x in rows if x["budget"] != 0.1]).short == "none"


def test_no_cell_of_the_evidence_is_longer_than_a_line() -> None:
    """A line of a phone, about."""
    lines = [line for line in evidence_tables.page().splitlines() if line.startswith("|")]
    longest = max((cell.strip() for line in lines for cell in line.split("|")), key=len)
    assert len(lines) > 50 and len(longest) <= 40, longest


@pytest.mark.parametrize("tool", [policy_tables, evidence_tables])
def test_a_page_out_of_date_is_found(tool: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tool, "PAGE", tmp_path / "page.md")
    assert tool.main(["--check"]) == 1
    assert tool.main([]) == tool.main(["--check"]) == 0


def test_an_unknown_run_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        evidence.main(["nothing"])
    assert "got 'nothing', expected one of policies" in capsys.readouterr().err


def test_claims_are_of_words_that_are_measured() -> None:
    measured = set(evidence.EVERY.split())
    assert {name for claim in CLAIMS for name in (claim.ahead, claim.behind)} <= measured


def test_rows_of_a_version_that_is_gone_are_named() -> None:
    now = row("predicted", 0.1, GOOD, policy_fields={})
    published = row("predicted:predictor=x", 0.1, GOOD, policy_fields={"predictor": {"kind": "cnn"}})
    before = row("predicted", 0.1, GOOD, policy_fields={"predictor": {"kind": "streaming"}})
    assert policy_tables.notice([now, published]) == ""
    assert "before it was fitted at the prompt" in policy_tables.notice([now, before])
