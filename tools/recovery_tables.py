"""Write the tables of docs/predictor.md from docs/results/*.json(l), so that no figure in them is typed by hand.

`python -m tools.recovery_tables` writes them; `--check` only says (exit code 1) when they are out of date.
"""

import itertools
import json
import re
import sys
from pathlib import Path
from typing import Any

from attnpred.evaluation.statistics import bootstrap

ROOT = Path(__file__).resolve().parents[1]
RESULTS, PAGE = ROOT / "docs" / "results", ROOT / "docs" / "predictor.md"
ASSETS = ROOT / "attnpred" / "assets" / "predictors"
Row = dict[str, Any]
FORECASTS = "predicted:late_share=0"
LIMITED = "predicted:late_share=0.06"
CORRECTED = "predicted"
QUERY = ("mean_key", "quest")
LINKS = {"25 GB/s": 25e9, "50 GB/s": 50e9, "1 GB/s": 1e9}


def load(name: str) -> list[Row]:
    """Return the rows of a JSON-lines file."""
    return [json.loads(line) for line in (RESULTS / name).read_text(encoding="utf-8").splitlines()]


def table(head: list[str], rows: list[list[str]]) -> str:
    """Return a Markdown table."""
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def share(budget: float) -> str:
    """Return a budget as a fraction."""
    return f"1/{round(1 / budget)}"


def by_budget(rows: list[Row], length: int) -> str:
    """Every policy at every budget: mean over documents and its interval."""
    own = [row for row in rows if row["length"] == length and row["text"] == "all"]
    budgets = sorted({row["budget"] for row in own}, reverse=True)
    lines = []
    for policy in dict.fromkeys(row["policy"] for row in own):
        cells = {row["budget"]: row for row in own if row["policy"] == policy}
        shown = [
            f"{cells[b]['value']:.3f} [{cells[b]['interval'][0]:.3f}, {cells[b]['interval'][1]:.3f}]" for b in budgets
        ]
        lines.append([f"`{policy}`", *shown])
    return table(["policy", *map(share, budgets)], lines)


def by_text(rows: list[Row], length: int, budget: float) -> str:
    """Every policy on every kind of text."""
    own = [row for row in rows if row["length"] == length and share(row["budget"]) == share(budget)]
    texts = list(dict.fromkeys(row["text"] for row in own))
    lines = [
        [f"`{policy}`", *(f"{row['value']:.3f}" for row in own if row["policy"] == policy)]
        for policy in dict.fromkeys(row["policy"] for row in own)
    ]
    return table(["policy", *texts], lines)


def best_rivals(rows: list[Row]) -> str:
    """Paired differences to the best rival, forecast against forecasts, correction against whoever may see the query."""
    own = [row for row in rows if row["text"] == "all"]
    lines = []
    for length in sorted({row["length"] for row in own}):
        for budget in sorted({row["budget"] for row in own}, reverse=True):
            cells = {row["policy"]: row for row in own if (row["length"], row["budget"]) == (length, budget)}
            rivals = [name for name in cells if name != "oracle" and (name == "predicted:predictor=attention-predictor-cnn,calibration_interval=5" or not name.startswith("predicted"))]  # fmt: skip
            forecast = max((name for name in rivals if name not in QUERY), key=lambda name: cells[name]["value"])
            everyone = max(rivals, key=lambda name: cells[name]["value"])
            line = [f"{length:,}", share(budget)]
            line += [_difference(cells[FORECASTS], cells[forecast]), f"`{forecast}`"]
            distance, best = 1 - cells[CORRECTED]["value"], 1 - cells[everyone]["value"]
            oracle = 1 - cells["oracle"]["value"]
            line += [f"{distance:.3f}", f"{best:.3f}", f"`{everyone}`", f"{distance / best:.2f}", f"{oracle:.3f}"]
            lines.append(line)
    head = [
        "length",
        "budget",
        "forecast ahead by",
        "of",
        "1 - ratio, corrected",
        "best rival",
        "which",
        "share of it",
        "oracle",
    ]
    return table(head, lines)


def _difference(ours: Row, theirs: Row) -> str:
    mean, low, high = _paired(ours, theirs)
    return f"{mean:+.3f} [{low:+.3f}, {high:+.3f}]"


def costs(rows: list[Row], length: int, budget: float) -> str:
    """What each policy has to move: worst decile, hits, churn, late blocks, state."""
    own = [r for r in rows if r["length"] == length and r["text"] == "all" and share(r["budget"]) == share(budget)]
    lines = [
        [
            f"`{row['policy']}`", f"{row['value']:.3f}", f"{row['worst_decile']:.3f}", f"{row['hit_rate']:.3f}",
            f"{row['churn']:.1%}", "-" if row["late_share"] is None else f"{row['late_share']:.1%}", f"{row['state_share']:.2%}",
        ]
        for row in own
    ]  # fmt: skip
    return table(["policy", "ratio", "worst decile", "hit rate", "churn", "late", "state"], lines)


def tokens_for(rows: list[Row], length: int) -> str:
    """Tokens of each head with which a policy reaches 90 % of the best selection's attention, between measured budgets."""
    own = [row for row in rows if row["length"] == length and row["text"] == "all"]
    lines = []
    for policy in dict.fromkeys(row["policy"] for row in own):
        points = sorted((row["budget"] * length, row["recovery"]) for row in own if row["policy"] == policy)
        lines.append([f"`{policy}`", f"{points[0][1]:.3f}", f"{points[-1][1]:.3f}", _reaches(points, 0.9)])
    return table(["policy", "attention at 1/32", "attention at 1/4", "tokens for 90 % of all attention"], lines)


def _reaches(points: list[tuple[float, float]], level: float) -> str:
    for (x0, y0), (x1, y1) in itertools.pairwise(points):
        if y0 < level <= y1:
            return f"{x0 + (x1 - x0) * (level - y0) / (y1 - y0):.0f}"
    return f"under {points[0][0]:.0f}" if points[0][1] >= level else f"over {points[-1][0]:.0f}"


def blocks(rows: list[Row]) -> str:
    """Recovery by block size, at the same budget in tokens, 64 sink and 64 recent tokens."""
    sizes = sorted({row["block_size"] for row in rows})
    lines = []
    for policy in dict.fromkeys(row["policy"] for row in rows):
        own = {row["block_size"]: row for row in rows if row["policy"] == policy}
        lines.append([f"`{policy}`", *(f"{own[size]['recovery']:.3f} ({own[size]['value']:.3f})" for size in sizes)])
    return table(["policy: attention (ratio)", *map(str, sizes)], lines)


def bandwidth(rows: list[Row], settings: list[Row]) -> str:
    """Milliseconds per token on a link, for a model of the 8B attention shape at 32K tokens, by what must be moved."""
    layers, heads, dim, context, block = 32, 8, 128, 32768, 16
    blocks = context * 0.076923 / block
    block_bytes = 2 * block * dim * 2
    found = {row["policy"]: row for row in [*settings, *(r for r in rows if r["length"] == 4096 and r["text"] == "all" and share(r["budget"]) == "1/13")]}  # fmt: skip
    lines = []
    for policy, every in (
        (FORECASTS, 0),
        ("predicted:late_share=0,calibration_interval=16", 16),
        ("predicted:late_share=0,calibration_interval=5", 5),
        ("ema:rate=0.1,calibration_interval=0", 0),
        ("ema:rate=0.1,calibration_interval=16", 16),
        ("ema:rate=0.1,calibration_interval=5", 5),
        (CORRECTED, 0),
    ):
        row = found[policy]
        moved = layers * heads * blocks * row["churn"] * block_bytes
        moved += layers * heads * context * dim * 2 / every if every else 0
        times = [f"{moved / speed * 1e3:.2f} ms" for speed in LINKS.values()]
        lines.append([f"`{policy}`", f"{row['value']:.3f}", f"{moved / 2**20:.0f} MiB", *times])
    return table(["policy", "ratio", "moved per token", *LINKS], lines)


def over_heads(rows: list[Row]) -> str:
    """Attention of `predicted` when the same total is divided: evenly, by head, or with the first layer dense.

    By head: bytes go, in steps of 1/64 of the context, where they recover most, between 1/32 and 1/4 for each head, along
    the measured curve. A computation from the curves, not a run.
    """
    curves = {row["budget"]: [x for layer in row["recovery_by_head"] for x in layer] for row in rows}
    layers = len(rows[0]["recovery_by_head"])
    shares = sorted(curves)
    heads = len(curves[shares[0]])

    def at(head: int, budget: float) -> float:
        for low, high in itertools.pairwise(shares):
            if budget <= high:
                part = (budget - low) / (high - low)
                return float(curves[low][head] * (1 - part) + curves[high][head] * part)
        return float(curves[shares[-1]][head])

    lines = []
    for budget in shares[1:]:
        even = sum(at(head, budget) for head in range(heads)) / heads
        given, step = [shares[0]] * heads, 1 / 64
        for _ in range(int((budget - shares[0]) * heads / step + 1e-6)):
            gains = [
                at(h, given[h] + step) - at(h, given[h]) if given[h] + step <= 0.25 else -1.0 for h in range(heads)
            ]
            given[gains.index(max(gains))] += step
        divided = sum(at(head, given[head]) for head in range(heads)) / heads
        rest = (budget - 1 / layers) / (1 - 1 / layers)
        per_layer = heads // layers
        dense = "-"
        if rest >= shares[0]:
            dense = f"{(per_layer + sum(at(head, rest) for head in range(per_layer, heads))) / heads:.4f}"
        lines.append([share(budget), f"{even:.4f}", f"{divided:.4f}", dense])
    return table(["total", "the same for every head", "divided over heads", "first layer dense"], lines)


def wanted(rows: list[Row], settings: list[Row]) -> str:
    """What was asked of the predictor, and what is reached."""
    own = [row for row in rows if row["text"] == "all"]
    cells = {(row["length"], share(row["budget"]), row["policy"]): row for row in own}
    lengths, budgets = sorted({row["length"] for row in own}), sorted({row["budget"] for row in own})
    ahead = halved = total = 0
    for length in lengths:
        for budget in map(share, budgets):
            here = {policy: row for (n, b, policy), row in cells.items() if (n, b) == (length, budget)}
            rivals = [p for p in here if not p.startswith("predicted") and p != "oracle"]
            rivals += [p for p in here if "cnn" in p]
            ahead += all(_paired(here[FORECASTS], here[p])[1] > 0 for p in rivals if p not in QUERY)
            best = min(1 - here[p]["value"] for p in rivals)
            halved += 1 - here[CORRECTED]["value"] <= best / 2
            total += 1
    at = {length: cells[length, "1/13", CORRECTED]["value"] for length in lengths}
    limited = cells[4096, "1/13", LIMITED]
    by_policy = {row["policy"]: row for row in settings if row["sink_tokens"] == 16}
    lost = [
        by_policy[f"{name}calibration_interval=5"]["value"] - cells[4096, "1/13", bare]["value"]
        for name, bare in (("predicted:late_share=0,", FORECASTS), ("predicted:", CORRECTED))
    ]
    sticky = by_policy["predicted:hysteresis=1"]
    base = cells[4096, "1/13", CORRECTED]
    cost = {row["context"]: row["us"] for row in _selection_rows() if row["variant"] == "predicted"}
    facts = json.loads((RESULTS / "facts.json").read_text(encoding="utf-8"))
    seconds = re.search(r"(\d+) s on", (ASSETS / "demo" / "README.md").read_text(encoding="utf-8"))
    assert seconds is not None
    loss = facts["predicted"]["bits_per_byte"] / facts["full"]["bits_per_byte"] - 1
    lines = [
        ["forecast ahead of every rival forecast by more than the interval", "every length and budget", f"{ahead} of {total}"],
        ["corrected: 1 - ratio at most half of the best rival's", "every length and budget", f"{halved} of {total}"],
        ["corrected: ratio at 1/13", "0.975 from 4K on", ", ".join(f"{x:.3f} at {n:,}" for n, x in at.items())],
        ["late blocks, limited", "under 5 %", f"{limited['late_share']:.1%} for a ratio of {limited['value']:.3f}"],
        ["lost by never calibrating (forecast, corrected)", "under 0.5 points", " and ".join(f"{100 * x:+.2f}" for x in lost)],
        ["selection at 32K and 128K", "0.35 and 0.5 ms", " and ".join(f"{cost[n] / 1e3:.2f}" for n in (32768, 131072)) + " ms"],
        ["state", "under 2 % of the KV", f"{base['state_share']:.2%}"],
        ["churn; with hysteresis 1", "stated", f"{base['churn']:.1%}; {sticky['churn']:.1%} for {100 * (sticky['value'] - base['value']):+.2f} points"],
        ["planted facts at 1/13", "within 1 of 100", f"{facts['predicted']['correct']} against {facts['full']['correct']} of {facts['full']['total']}"],
        ["perplexity (bits per byte) at 1/13", "within 0.5 %", f"{loss:+.2%}"],
        ["training a predictor", "under 10 minutes", f"{int(seconds[1]) / 60:.1f} minutes"],
    ]  # fmt: skip
    return table(["what", "wanted", "reached"], lines)


def _paired(ours: Row, theirs: Row) -> tuple[float, float, float]:
    """Return the mean difference over documents and its interval."""
    import torch

    paired = torch.tensor(ours["documents"]) - torch.tensor(theirs["documents"])
    low, high = bootstrap(paired)
    return float(paired.mean()), low, high


def _selection_rows() -> list[Row]:
    rows: list[Row] = json.loads((RESULTS / "selection.json").read_text(encoding="utf-8"))["rows"]
    return rows


def selection() -> str:
    """What choosing costs, from benchmarks/selection.py."""
    rows = _selection_rows()
    lines = [[f"{r['context']:,}", f"`{r['variant']}`", f"{r['us']:.0f}", f"{r['attention_us']:.0f}"] for r in rows]
    return table(["tokens", "variant", "us per layer and step", "sparse attention, us"], lines)


def tables() -> dict[str, str]:
    """Return every table by its name."""
    rows, settings = load("recovery.jsonl"), load("recovery_settings.jsonl")
    longest = max(row["length"] for row in rows)
    found = {f"budgets-{length}": by_budget(rows, length) for length in sorted({row["length"] for row in rows})}
    here = 4096
    return found | {
        "wanted": wanted(rows, settings),
        "rivals": best_rivals(rows),
        "texts": by_text(rows, here, 1 / 13),
        "costs": costs(rows, here, 1 / 13),
        "tokens": tokens_for(rows, longest),
        "settings": costs([row for row in settings if row["sink_tokens"] == 16], here, 1 / 13),
        "blocks": blocks([row for row in settings if row["sink_tokens"] == 64]),
        "kinds": by_text(load("text_kinds.jsonl"), here, 1 / 13),
        "second": costs(load("second_model.jsonl"), here, 1 / 13),
        "heads": over_heads(load("recovery_heads.jsonl")),
        "bandwidth": bandwidth(rows, settings),
        "selection": selection(),
    }


def written(page: str) -> str:
    """Return `page` with every table between its markers."""
    for name, text in tables().items():
        begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
        if begin in page:
            before, _, rest = page.partition(begin)
            page = f"{before}{begin}\n{text}\n{end}{rest.partition(end)[2]}"
    return page


def main(arguments: list[str]) -> int:
    """Write or check the tables; return the exit code."""
    page = PAGE.read_text(encoding="utf-8")
    new = written(page)
    if "--check" in arguments:
        if new != page:
            print("docs/predictor.md is out of date: run `python -m tools.recovery_tables`", file=sys.stderr)
        return int(new != page)
    PAGE.write_text(new, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
