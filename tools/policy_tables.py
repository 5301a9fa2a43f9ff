"""Write docs/policies.md from rows of `attnpred eval` in docs/results: no figure in it is typed by hand.

`tools.evidence` makes the rows, which takes long: those of `QUALITY`, `offloaded` for bytes, `times` for milliseconds.
`python -m tools.policy_tables` writes the page, and `--check` only says (exit code 1) when it is out of date. `TITLES` says
which tasks the page shows and what it calls them.
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path

from attnpred.evaluation.statistics import difference
from tools import pod_tables
from tools.policy_claims import CLAIMS, Row, compared, verdict
from tools.speed_tables import table

ROOT = Path(__file__).resolve().parents[1]
RESULTS, PAGE = ROOT / "docs" / "results", ROOT / "docs" / "policies.md"
QUALITY = ("policies", "turns", "further", "prompted")
TITLES = {
    "facts1": "one fact",
    "facts4": "four facts",
    "facts4_prompt": "four, question in the prompt",
    "hops": "several hops",
    "facts_turns": "two turns",
    "perplexity": "bits per byte",
}
HEAD = """# Policies compared

Written by `make docs` from `docs/results`. Do not edit.

Every policy runs on the same backend: it really reads the blocks that it names and no others, and one that evicts has
really freed the rest. A document is read once, by dense attention. Questions come after it, each on a copy of the cache as
it was then (`apart`), or one after the other on the same cache (`two turns`). `question in the prompt` is the setting in
which methods that choose at the end of the prompt are published: there, what chooses has seen the question. Every token of
an answer comes from a step of one token.

Accuracy is the share of answers in which every digit is right. `recovery ratio` is the attention inside the selection over
that inside the best selection of as many blocks, on the first document; bits per byte are of the end of held-out books,
teacher-forced. Read: keys, values and digests that a decode step reads. Fast, slow and moved are of the same cache with
`offload="cpu"`: what it takes of either tier, and what a step moves between them (a policy that evicts has no use for a slow
tier). Milliseconds are of steps in memory at 1/13, where policies take turns in one run (`attnpred bench decode`); a model of
this size has little to win there (`docs/speed.md`). No setting was chosen by these texts."""


def load(name: str) -> list[Row]:
    """Return the rows of a run; none if it was not made."""
    path = RESULTS / f"{name}.jsonl"
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.is_file() else []


def notice(rows: Sequence[Row]) -> str:
    """Return what to say where rows of `predicted` are of a predictor that was trained, which no version has any more."""
    if not any(row.get("policy_fields", {}).get("predictor", {}).get("kind") == "streaming" for row in rows):
        return ""
    return (
        "Rows of `predicted` here are of the version before it was fitted at the prompt: blocks of 16 tokens, a predictor trained on "
        "this very model. [The predictor](predictor.md) has today's; to measure these anew, take them out of `docs/results` "
        "and run `make evidence`."
    )


def times() -> dict[str, Row]:
    """Return what a step takes by policy; nothing if it was not measured."""
    path = RESULTS / "policy_times.json"
    found = json.loads(path.read_text(encoding="utf-8"))["rows"] if path.is_file() else []
    return {{"dense": "full"}.get(row["variant"], row["variant"]): row for row in found}


def share(budget: float) -> str:
    """Return a budget as a fraction."""
    return f"1/{round(1 / budget)}" if budget < 1 else "all"


def number(value: float | None, digits: int = 2, unit: float = 1) -> str:
    """Return a figure in that unit, or a dash."""
    return "-" if value is None else f"{value / unit:.{digits}f}"


def by_cell(rows: Sequence[Row]) -> dict[tuple[str, float], dict[str, Row]]:
    """Return rows by (policy, budget), and there by task."""
    found: dict[tuple[str, float], dict[str, Row]] = {}
    for row in rows:
        found.setdefault((row["policy"], row["budget"] or 1.0), {})[row["task"]] = row
    return found


def budget_table(rows: Sequence[Row], budget: float, costs: dict[tuple[str, float], Row], times: dict[str, Row]) -> str:
    """Every policy at one budget, quality and cost; the full cache for comparison."""
    cells = {key: own for key, own in by_cell(rows).items() if key[1] == budget or key[0] == "full"}
    head = ["policy", "kind", "recovery ratio", *TITLES.values(), "read KiB", "fast MiB", "slow MiB", "moved KiB", "ms"]
    lines = []
    for (policy, share_of), own in sorted(cells.items(), key=lambda cell: -_facts(cell[1])):
        some = own.get("facts4") or next(iter(own.values()))
        cost = costs.get((policy, share_of), {})
        lines.append(
            [f"`{policy}`", f"{some['kind']}, {some['granularity']}", number(some.get("recovery_ratio"), 3)]
            + [number(own[task]["value"], 3 if task == "perplexity" else 2) if task in own else "-" for task in TITLES]
            + [number(some["bytes_per_step"], 0, 2**10), number(cost.get("fast_bytes"), 2, 2**20)]
            + [number(cost.get("slow_bytes"), 2, 2**20), number(cost.get("moved_bytes_per_step"), 0, 2**10)]
            + [number(times.get(policy, {}).get("ms_per_token"), 1)]
        )
    return table(head, lines)


def _facts(own: dict[str, Row]) -> float:
    asked = [row["value"] for row in own.values() if row["metric"] == "accuracy" and row["task"] != "facts4_prompt"]
    return sum(asked) / len(asked) if asked else 0.0


def against_full(rows: Sequence[Row], task: str) -> str:
    """What every policy loses against the full cache at every budget, with the interval."""
    own = [row for row in rows if row["task"] == task and row.get("against_full")]
    budgets = sorted({row["budget"] for row in own}, reverse=True)
    lines = []
    for policy in dict.fromkeys(row["policy"] for row in own):
        found = {row["budget"]: row["against_full"] for row in own if row["policy"] == policy}
        lines.append([f"`{policy}`", *(_shown(found.get(budget)) for budget in budgets)])
    return table(["policy", *map(share, budgets)], lines)


def _shown(found: Row | None) -> str:
    if not found or not found.get("interval"):
        return "-"
    return f"{found['difference']:+.2f} [{found['interval'][0]:+.2f}, {found['interval'][1]:+.2f}]"


def turns(rows: Sequence[Row]) -> str:
    """First and second question on the same cache, over all budgets: what has a policy lost by the second?"""
    lines = []
    own = [row for row in rows if row["task"] == "facts_turns"]
    for policy in dict.fromkeys(row["policy"] for row in own):
        asked: tuple[dict[str, float], dict[str, float]] = ({}, {})
        for row in own:
            for item in row["items"] if row["policy"] == policy else ():
                document = item["name"].rpartition("/")[0]
                asked[item["labels"]["turn"] - 1][f"{row['budget']}/{document}"] = item["value"]
        means = [number(sum(one.values()) / len(one)) for one in asked]
        lines.append([f"`{policy}`", *means, _shown(difference(asked[1], asked[0]))])
    return table(["policy", "first question", "second question", "second - first"], lines)


def claims(rows: Sequence[Row]) -> str:
    """Published orderings, and what became of them here."""
    lines = []
    for claim in CLAIMS:
        found = compared(rows, claim.ahead, claim.behind)
        lines.append([f"`{claim.ahead}` over `{claim.behind}`", claim.source, _shown(found), verdict(found)])
    return table(["ordering", "published in", "difference here", "verdict"], lines)


def what_ran(rows: Sequence[Row]) -> str:
    """Return in a sentence what was run where."""
    row, config = rows[-1], rows[-1]["config"]
    counts = ", ".join(f"{TITLES[task]} {max(r['n'] for r in rows if r['task'] == task)}" for task in TITLES if any(r["task"] == task for r in rows))  # fmt: skip
    return (
        f"Model: {row['model']}. Documents of {row['length']:,} tokens, seed {row['seed']}, {config['num_sink_tokens']} sink "
        f"and {config['recent_window']} recent tokens, no dense layers. Items: {counts}. torch {row['versions']['torch']}, "
        f"transformers {row['versions']['transformers']}, commit {row['commit']}."
    )


def page(rows: Sequence[Row], offloaded: Sequence[Row], timed: dict[str, Row]) -> str:
    """Return the page: quality of `rows`, bytes of `offloaded`, milliseconds of `timed`."""
    costs = {(row["policy"], row["budget"] or 1.0): row for row in offloaded}
    parts = [HEAD, notice([*rows, *offloaded]), what_ran(rows)]
    if "floor" in timed:
        parts.append(f"Without any attention a step takes {timed['floor']['ms_per_token']:.1f} ms.")
    for budget in sorted({row["budget"] for row in rows if row["policy"] != "full"}, reverse=True):
        parts += [f"## A budget of {share(budget)}", "By mean accuracy.", budget_table(rows, budget, costs, timed)]
    parts += [
        "## Against the full cache",
        "Difference in accuracy with four facts, paired by question, and its 95 % interval.",
    ]
    parts += [
        against_full(rows, "facts4"),
        "## Two questions, one after the other",
        "Over all budgets, paired by document.",
    ]
    parts += [turns(rows), "## Orderings that papers publish", _CLAIMS, claims(rows), pod_tables.section(RESULTS)]
    return "\n\n".join(filter(None, parts)) + "\n"


_CLAIMS = (
    "Mean difference in accuracy over all tasks and all budgets below 1/5, paired by document. A model of 5 million "
    "parameters at a few thousand tokens is not what the papers measured: a verdict is about this model."
)


def main(arguments: list[str]) -> int:
    """Write or check the page; return the exit code."""
    text = page([row for name in QUALITY for row in load(name)], load("offloaded"), times())
    if "--check" not in arguments:
        PAGE.write_text(text, encoding="utf-8")
    elif not PAGE.is_file() or PAGE.read_text(encoding="utf-8") != text:
        print("docs/policies.md is out of date: run make docs", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
