"""The first part of docs/evidence.md: what real models do with their full cache, and what the policies keep of it.

Made from docs/results/real.jsonl (`make evidence-real`) and docs/results/llama_logits.json (`python -m tools.llama_logits`).
"""

import json
from collections.abc import Iterator, Sequence
from typing import Any

from attnpred.evaluation.plan import FULL
from attnpred.evaluation.statistics import difference
from tools.evidence_real import RUNS, THIRTEENTH, can
from tools.policy_tables import RESULTS, load, share
from tools.speed_tables import table

Row = dict[str, Any]

HEAD = """## Real models

`make evidence-real`: SmolLM2-135M-Instruct and, where there are rows of it, Gemma 3 270M, as `attnpred models` fetches them, in
fp32 on a CPU. Few documents a cell, because a CPU reads slowly: the intervals are wide, and a difference inside them is none. They
are 95 % bootstrap intervals over documents; where all documents score the same there is none to show, which says little for four.
Chance is what the right answers to another document score; a task whose interval reaches it is left out. The policies are as
shipped; nothing was tuned on these models.
`agreement` is the distance to the full cache over its own continuation of a book, in nats per token; there lower is better, and
the full cache has 0."""


BEFORE = "predicted_before"
"""The policy of rows that were made with `predicted` as it was before it was fitted at the prompt."""
ABOUT_BEFORE = """`predicted_before` is what `predicted` was when most rows were made: blocks of 16 tokens, weights from two toy models. Today's,
which is fitted while the prompt is read, has rows of its own; where it has none, it was not measured there."""


def interval(value: Row | None) -> str:
    """Return a value's interval; a dash where there is none, or where it has no width."""
    low, high = value["interval"] if value else (0, 0)
    return f"{low:.2f} to {high:.2f}" if low < high else "-"


def named(task: str) -> str:
    """Return a task without the name of its file."""
    return task.partition("=")[0]


def places(rows: Sequence[Row]) -> Iterator[tuple[str, int]]:
    """Yield model and length, in the order in which they were measured."""
    yield from dict.fromkeys((row["model"], row["length"]) for row in rows)


def full_cache(rows: Sequence[Row]) -> str:
    """Return what each model does with its full cache, and what is therefore compared."""
    lines = []
    for row in rows:
        if row["policy"] == "full" and not row["lower_is_better"]:
            compared = "yes" if can(row) else "no: at chance"
            place = [row["model"], named(row["task"]), f"{row['length']:,}", str(row["n"])]
            lines.append([*place, f"{row['value']:.2f}", interval(row), compared])
    return table(["model", "task", "tokens", "questions", "full cache", "interval", "compared"], lines)


def comparison(rows: Sequence[Row], model: str, length: int) -> str:
    """Return policy by task at each budget, at one length; empty where nothing is compared."""
    own = [row for row in rows if (row["model"], row["length"]) == (model, length)]
    full = {row["task"]: row for row in own if row["policy"] == "full" and can(row)}
    cells: dict[tuple[float, str], dict[str, Row]] = {}
    for row in own:
        if row["policy"] != "full" and row["task"] in full:
            cells.setdefault((row["budget"], row["policy"]), {})[row["task"]] = row
    if not cells:
        return ""
    lines = [["full", "all", f"{length:,}", *(f"{full[task]['value']:.2f}" for task in full)]]
    spans = [["full", "all", *(interval(full[task]) for task in full)]]
    for (budget, policy), found in sorted(cells.items(), key=lambda item: -item[0][0]):
        attended = max(row["tokens_attended"] for row in found.values())
        values = (f"{found[task]['value']:.2f}" if task in found else "-" for task in full)
        lines.append([f"`{policy}`", share(budget), f"{attended:,.0f}", *values])
        spans.append([f"`{policy}`", share(budget), *(interval(found.get(task)) for task in full)])
    titles = ["policy", "budget", "tokens", *map(named, full)]
    narrow = [title for title in titles if title != "tokens"]
    return f"### {model}, {length:,} tokens\n\n{table(titles, lines)}\n\nTheir intervals:\n\n{table(narrow, spans)}"


def pooled(rows: Sequence[Row], model: str, length: int) -> str:
    """Return all questions of the compared tasks of a length together, at 1/13, against the full cache and against `ema`."""
    full, budget = {}, round(THIRTEENTH[0], 6)
    found: dict[str, dict[str, Row]] = {}
    for row in rows:
        if (row["model"], row["length"]) == (model, length) and not row["lower_is_better"]:
            if row["policy"] == FULL and can(row):
                full[row["task"]] = row
            elif row["budget"] == budget:
                found.setdefault(row["policy"], {})[row["task"]] = row
    values = {
        policy: {f"{task}/{item['name']}": item["value"] for task in full for item in cells[task]["items"]}
        for policy, cells in ({FULL: full} | found).items()
        if full.keys() <= cells.keys()
    }
    if len(values) < 2 or len(full) < 2:
        return ""
    lines = []
    for policy, own in values.items():
        beside = [_paired(own, values.get(other, {})) if policy != other else "-" for other in (FULL, "ema")]
        lines.append([f"`{policy}`", str(len(own)), f"{sum(own.values()) / len(own):.2f}", *beside])
    head = f"### {model}, {length:,} tokens, all {len(full)} compared tasks together, at 1/13"
    return f"{head}\n\n{table(['policy', 'questions', 'right', 'against the full cache', 'against `ema`'], lines)}"


def _paired(own: dict[str, float], other: dict[str, float]) -> str:
    compared = difference(own, other)
    if not compared["n"]:
        return "-"
    low, high = compared["interval"]
    return f"{compared['difference']:+.2f} [{low:+.2f}, {high:+.2f}]"


def llama() -> str:
    """Return how our load agrees with llama.cpp; empty where it was not measured."""
    path = RESULTS / "llama_logits.json"
    if not path.is_file():
        return ""
    found = json.loads(path.read_text(encoding="utf-8"))
    stored, exact = found["stored"], found["exact"]
    return (
        f"The load is checked against llama.cpp on the same GGUF file (`python -m tools.llama_logits`): of {stored['prompts']} "
        f"prompts {stored['same']} have the same next token, {stored['near_ties']} are near-ties, and the log-probabilities of its "
        f"ten likeliest tokens differ by {stored['difference']:.3f} nats on average, at most {stored['largest']:.2f} (llama.cpp "
        f"rounds activations to 8 bits there). Weights that are not rounded to bf16 differ by {exact['difference']:.3f}."
    )


def not_run(rows: Sequence[Row]) -> str:
    """Return the tasks of `RUNS` that there was no time for yet; empty where there are none."""
    done = {(row["model"], row["length"], row["task"]) for row in rows}
    wanted = [(run.model, run.length, task) for run in RUNS for task in run.tasks.split()]
    places = dict.fromkeys(place for place in wanted if place not in done)
    left = [f"{model} {named(task)} at {length:,}" for model, length, task in places]
    return f"Not measured yet: {', '.join(left)}." if left else ""


def section() -> str:
    """Return the part of the page; empty where nothing was measured."""
    rows = load("real")
    if not rows:
        return ""
    together = (pooled(rows, model, length) for model, length in places(rows))
    tables = (comparison(rows, model, length) for model, length in places(rows))
    head = f"{HEAD}\n{ABOUT_BEFORE}" if any(row["policy"] == BEFORE for row in rows) else HEAD
    return "\n\n".join(part for part in (head, full_cache(rows), not_run(rows), *together, *tables, llama()) if part)
