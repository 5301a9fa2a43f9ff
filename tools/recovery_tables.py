"""Write the tables of docs/predictor.md from docs/results/*.jsonl, so that no figure in them is typed by hand.

`python -m tools.recovery_tables` writes them; `--check` only says (exit code 1) when they are out of date.
"""

import json
import re
import sys
from pathlib import Path
from typing import Any

import torch

from attnpred.evaluation.statistics import bootstrap
from tools.recovery_results import OURS

ROOT = Path(__file__).resolve().parents[1]
RESULTS, PAGE = ROOT / "docs" / "results", ROOT / "docs" / "predictor.md"
Row = dict[str, Any]
FORECASTS = ("last_step", "ema", "accumulated", "streaming", "freekv", "predicted:predictor")
CNN = "predicted:predictor=smollm2-cnn,calibration_interval="
AUTHORS = f"{CNN}5,num_sink_tokens=64,recent_window=64,per_query_head=true"
FORECAST = {
    0: "predicted:late_share=0,estimate_rest=false",
    1: "predicted:late_share=0,calibration_interval=1,estimate_rest=false",
}
"""Of the fitted forecast, by how often it gets a true row."""
QUERY = ("mean_key", "quest")
ESTIMATED = ("estimate_rest=true", "estimate_rest=false")
"""What a row says of the rest where it is not what the policy does by itself."""


def load(name: str) -> list[Row]:
    """Return the rows of a JSON-lines file, none where it is missing."""
    file = RESULTS / name
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()] if file.is_file() else []


def table(head: list[str], rows: list[list[str]]) -> str:
    """Return a Markdown table."""
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def share(budget: float) -> str:
    """Return a budget as a fraction."""
    return f"1/{round(1 / budget)}"


def name_of(row: Row) -> str:
    """Return the policy without the budget that its digests have left it."""
    return re.sub(r"[:,]budget=[\d.]+", "", row["policy"])


def interval(values: list[float]) -> str:
    """Return the mean and its 95 % interval."""
    low, high = bootstrap(torch.tensor(values))
    return f"{sum(values) / len(values):.3f} [{low:.3f}, {high:.3f}]"


def by_budget(rows: list[Row], field: str) -> str:
    """Every policy at every budget: mean over documents and its interval, of `documents` or `document_errors`."""
    budgets = sorted({row["budget"] for row in rows}, reverse=True)
    cells: dict[str, dict[float, str]] = {}
    for row in rows:
        cells.setdefault(name_of(row), {})[row["budget"]] = interval(row[field])
    lines = [[f"`{name}`", *(found.get(budget, "-") for budget in budgets)] for name, found in cells.items()]
    return table(["policy", *map(share, budgets)], lines)


def against(rows: list[Row]) -> str:
    """The forecast against the best forecast rival, and the corrected choice against the best rival of all, by document."""
    lines = []
    for budget in sorted({row["budget"] for row in rows}, reverse=True):
        own = {name_of(row): row for row in rows if row["budget"] == budget}
        forecast, corrected = own[OURS[0]], own[OURS[1]]
        published = {name: row for name, row in own.items() if not name.endswith(ESTIMATED)}
        rivals = {name: row for name, row in published.items() if name.startswith(FORECASTS)}
        best = max(rivals, key=lambda name: rivals[name]["recovery"])
        everyone = {name: row for name, row in published.items() if name.startswith(QUERY)} | rivals
        closest = min(everyone, key=lambda name: everyone[name]["output_error"])
        ahead = [a - b for a, b in zip(_recovered(forecast), _recovered(rivals[best]), strict=True)]
        ratio = [a / b for a, b in zip(corrected["document_errors"], everyone[closest]["document_errors"], strict=True)]
        lines.append([share(budget), interval(ahead), f"`{best}`", interval(ratio), f"`{closest}`"])
    return table(["budget", "forecast ahead by", "of", "output error, corrected, over that", "of"], lines)


def rest(rows: list[Row]) -> str:
    """Every policy that was measured with an estimate of the rest and without: output error, and the ratio by document."""
    lines = []
    for budget in sorted({row["budget"] for row in rows}, reverse=True):
        own = {name_of(row): row for row in rows if row["budget"] == budget}
        for name in own:
            plain = re.sub(r"[:,]estimate_rest=\w+$", "", name)
            if plain == name or plain not in own:
                continue
            other = own[plain]
            pair = (own[name], other) if name.endswith(ESTIMATED[0]) else (other, own[name])
            with_it, without = (row["document_errors"] for row in pair)
            ratio = interval([a / b for a, b in zip(with_it, without, strict=True)])
            lines.append([f"`{plain}`", share(budget), interval(without), interval(with_it), ratio])
    return table(["policy", "budget", "without", "with", "with over without"], lines)


def trained(rows: list[Row]) -> str:
    """The published network trained on this model, an average, and the fitted forecast, by how often they get a true row."""
    lines, own = [], {name_of(row): row for row in rows if share(row["budget"]) == "1/13"}
    for when, every in (("every step (open loop)", 1), ("every fifth step", 5), ("never (closed loop)", 0)):
        names = f"{CNN}{every}", f"ema:rate=0.2,calibration_interval={every}", FORECAST.get(every, "")
        average = own.get(names[1])
        for name in names:
            if name not in own or average is None:
                continue
            row = own[name]
            ahead = [a - b for a, b in zip(_recovered(row), _recovered(average), strict=True)]
            cells = [interval(row[field]) for field in ("document_recovery", "documents", "document_errors")]
            lines.append([f"`{name}`", when, *cells, "-" if row is average else interval(ahead)])
    authors = own.get(AUTHORS)
    if authors is not None:
        cells = [interval(authors[field]) for field in ("document_recovery", "documents", "document_errors")]
        lines.append([f"`{AUTHORS}`", "every fifth step", *cells, "-"])
    head = ["forecast", "true rows", "attention kept", "ratio", "output error", "kept, ahead of the average by"]
    return table(head, lines)


def selection_times() -> str:
    """What a selection of a layer takes, with each of three forecasts, and the attention that it serves."""
    found = json.loads((RESULTS / "selection.json").read_text(encoding="utf-8"))["rows"]
    lines = [
        [f"{row['context']:,}", row["variant"], f"{row['us']:,.0f}", f"{row['attention_us']:,.0f}"]
        for row in found
        if row["variant"] in ("cnn", "ema", "predicted") and row["context"] in (4096, 16384)
    ]
    return table(["context", "forecast", "us a selection", "us of its attention"], lines)


def _recovered(row: Row) -> list[float]:
    return list(row["document_recovery"])


def costs(rows: list[Row]) -> str:
    """What has to be moved, and what it takes to remember, at 1/13."""
    lines = [
        [
            f"`{name_of(row)}`", f"{row['recovery']:.3f}", f"{row['worst_decile']:.3f}",
            f"{row['churn']:.3f}", "-" if row["late_share"] is None else f"{row['late_share']:.3f}", f"{row['state_share']:.2%}",
        ]
        for row in rows
        if share(row["budget"]) == "1/13"
    ]  # fmt: skip
    return table(["policy", "attention kept", "ratio, worst decile", "churn", "late", "state"], lines)


def tables() -> dict[str, str]:
    """Return the page's tables by name."""
    rows = [row for row in load("recovery.jsonl") if row["text"] == "all"]
    return {
        "kept": by_budget(rows, "document_recovery"), "ratio": by_budget(rows, "documents"),
        "error": by_budget(rows, "document_errors"), "against": against(rows), "costs": costs(rows),
        "rest": rest(rows), "trained": trained(rows), "times": selection_times(),
    }  # fmt: skip


def main(arguments: list[str]) -> int:
    """Write the page, or check it; return the exit code."""
    before = text = PAGE.read_text(encoding="utf-8")
    for name, shown in tables().items():
        start, end = f"<!-- {name}:begin -->\n", f"\n<!-- {name}:end -->"
        text = re.sub(f"(?s){re.escape(start)}.*?{re.escape(end)}", lambda _, x=start + shown + end: x, text)
    if arguments == ["--check"]:
        return int(text != before)
    PAGE.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
