"""Write docs/speed.md from docs/results/*.json, so that no figure in it is typed by hand.

`python -m tools.speed_tables` writes it; `--check` only says (exit code 1) when it is out of date. A file of results that
is not there leaves its section out. The files are what `attnpred bench NAME --out docs/results/NAME.json` writes.
"""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tools.speed_targets import CALL_BUDGET, Row, number, targets

ROOT = Path(__file__).resolve().parents[1]
RESULTS, PAGE = ROOT / "docs" / "results", ROOT / "docs" / "speed.md"
HEAD = """# Speed

Written by `make docs` from `docs/results`. Do not edit.

Every table is one run, in which variants take turns and data is cold; each benchmark says in its own words (`benchmarks/`)
what it measures, and checks that all variants compute the same before it takes any time. Figures are medians. Machines
drift, so compare within a row. `floor` is the same model without attention; `packed` is the fastest attention of stock
torch, written into a preallocated cache; `dense` is attnpred's own attention to everything.
"""


def table(head: list[str], rows: list[list[str]]) -> str:
    """Return a Markdown table."""
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def where(found: Row, name: str) -> str:
    """Return on what, from what, and by which command."""
    known = [f"{key} {found[key]}" for key in ("torch", "transformers", "numba") if found.get(key)]
    cpu = f"{found['threads']} threads of {found['cpu']}" if found.get("cpu") else f"{found['threads']} threads"
    commit = [f"commit {found['commit']}"] if found.get("commit") else []
    return f"`attnpred bench {name}`: {', '.join([cpu, *known, *commit])}."


def by_key(rows: list[Row], *names: str) -> dict[tuple[Any, ...], list[Row]]:
    """Return rows grouped by the values of some keys."""
    found: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        found.setdefault(tuple(row[name] for name in names), []).append(row)
    return found


def rivals(found: Row) -> str:
    """The section of what else a laptop's user would take."""
    parts = ["## Beside llama.cpp and transformers", where(found, "rivals")]
    parts.append(
        "Milliseconds per token, and seconds of the prompt in brackets, by tokens of context. `attnpred` is `predicted` with a "
        f"thirteenth of the cache; then weights, and the numbers of keys and values. The load of the machine was "
        f"{number(found['rows'][0]['load'][0])} to {number(found['rows'][-1]['load'][1])}; at rest it is the number of threads."
    )
    for (model,), rows in by_key(found["rows"], "model").items():
        contexts = list(dict.fromkeys(row["context"] for row in rows))
        lines = []
        for (engine, weights, kv), own in by_key(rows, "engine", "weights", "kv").items():
            cells = {row["context"]: row for row in own}
            shown = [
                f"{number(cells[at]['ms_per_token'])} ({number(cells[at]['prompt_ms'] / 1e3)})" if at in cells else "-"
                for at in contexts
            ]
            lines.append([f"{engine}, {weights}, {kv}", *shown])
        parts.append(table([model, *(f"{context:,}" for context in contexts)], lines))
    return "\n\n".join(parts)


def linear(found: Row) -> str:
    """The section of products of one row with a matrix."""
    parts = ["## One row times a matrix", where(found, "linear").replace("attnpred bench ", "python -m benchmarks.")]
    parts.append(
        "GB/s of weights that were in no cache, and in brackets the share of the speed at which memory is read in the same "
        f"rounds; load {number(found['load'])}:"
    )
    rows = [row for row in found["rows"] if row["vectors"] == 1]
    names = list(dict.fromkeys(row["variant"] for row in rows))
    lines = []
    for (height, width), own in by_key(rows, "rows", "width").items():
        cells = {row["variant"]: f"{number(row['gb_per_s'])} ({row['share']:.0%})" for row in own}
        lines.append([f"{height:,} x {width:,}", *(cells.get(name, "-") for name in names)])
    parts.append(table(["matrix", *names], lines))
    return "\n\n".join(parts)


def busy(found: Row) -> str:
    """The section of a token beside other programs."""
    about = where(found, "busy").replace("attnpred bench ", "python -m benchmarks.")
    lines = [
        [row["weights"], str(row["busy"]), *(number(row[name]) for name in ("ms_per_token", "worst_ms", "over_rest"))]
        for row in found["rows"]
    ]
    told = f"SmolLM2, {found['rows'][0]['context']:,} tokens; load before it {number(found['load'])}:"
    heads = ["weights", "processes that spin", "ms a token", "the slowest", "over none"]
    return "\n\n".join(["## Beside other programs", about, told, table(heads, lines)])


def weights(found: Row) -> str:
    """The section of what packing loses."""
    parts = [
        "## What packed weights lose",
        where(found, "weights").replace("attnpred bench ", "python -m benchmarks."),
        f"{found['windows']} windows of {found['window_tokens']:,} tokens of a book, full cache; `row`: int8 with one scale for a row:",
    ]
    lines = [
        [row["model"], row["weights"], f"{row['bits_per_byte']:.4f}", f"{row['kl']:.2g}", f"{row['same']:.1%}"]
        for row in found["rows"]
    ]
    parts.append(table(["model", "weights", "bits per byte", "KL to fp32, nats a token", "same next token"], lines))
    return "\n\n".join(parts)


def decode(found: Row) -> str:
    """The section of whole steps."""
    parts = ["## A decode step", where(found, "decode")]
    ratios = {(row["shape"], row["dtype"], row["context"]): row for row in found.get("ratios", ())}
    for (shape, dtype), rows in by_key(found["rows"], "shape", "dtype").items():
        variants = list(dict.fromkeys(row["variant"] for row in rows))
        lines = []
        for (context,), own in by_key(rows, "context").items():
            ms = {row["variant"]: row["ms_per_token"] for row in own}
            other = ratios.get((shape, dtype, context), {})
            shown = [other.get(name) for name in RATIOS]
            lines.append([f"{context:,}", *(number(ms.get(name)) for name in variants), *map(number, shown)])
        layers = f", {rows[0]['layers']} layers" if "layers" in rows[0] else ""
        parts.append(f"Milliseconds per token, {shape} in {dtype}{layers}, budget {found['budget']}:")
        parts.append(table(["tokens", *variants, *RATIOS.values()], lines))
    if "first_token_s" in found:
        first = found["first_token_s"]
        parts.append(
            f"From the imported library to the first token of a sparse step, 2,048 tokens of prompt and 2 layers included: "
            f"{number(first['torch'])} s with torch alone, {number(first['cold'])} s where numba has everything to compile, "
            f"{number(first['warm'])} s from then on."
        )
    return "\n\n".join(parts)


RATIOS = {
    "predicted_over_floor": "predicted / floor",
    "best_dense_over_predicted": "best dense / predicted",
    "transformers_over_predicted": "transformers / predicted",
}


def attention(found: Row) -> str:
    """The section of single calls."""
    parts = ["## One call of attention", where(found, "attention")]
    for (shape, dtype), rows in by_key(found["rows"], "shape", "dtype").items():
        rows = [row for row in rows if row.get("budget") in (None, CALL_BUDGET)]
        variants = list(dict.fromkeys(row["variant"] for row in rows))
        lines = []
        for (context,), own in by_key(rows, "context").items():
            cells = {row["variant"]: row for row in own}
            dense = next(row for row in own if "budget" not in row)
            sparse = next((row for row in own if "budget" in row), None)
            us = [number(cells[name]["us"]) if name in cells else "-" for name in variants]
            lines.append([f"{context:,}", *us, number(dense["limit_us"]), number(sparse and sparse["limit_us"])])
        parts.append(f"Microseconds, {shape} in {dtype}; sparse calls attend to {CALL_BUDGET:,} tokens:")
        parts.append(table(["tokens", *variants, "limit, dense", "limit, sparse"], lines))
    return "\n\n".join(parts)


def selection(found: Row) -> str:
    """The section of choosing."""
    rows, names = found["rows"], list(dict.fromkeys(row["variant"] for row in found["rows"]))
    lines = []
    for (context,), own in by_key(rows, "context").items():
        us = {row["variant"]: row["us"] for row in own}
        lines.append([f"{context:,}", *(number(us.get(name)) for name in names), number(own[0]["attention_us"])])
    parts = ["## Choosing the blocks", where(found, "selection")]
    parts.append(
        "Microseconds per layer and step, all that is done besides attending, and the attention call that `predicted` serves:"
    )
    parts.append(table(["tokens", *names, "attention"], lines))
    return "\n\n".join(parts)


def batches(found: Row) -> str:
    """The section of batches."""
    names = list(dict.fromkeys(row["variant"] for row in found["rows"]))
    lines = []
    for (batch, kind), own in by_key(found["rows"], "batch", "kind").items():
        speed = {row["variant"]: row["tokens_per_s"] for row in own}
        lines.append([f"{batch}, {kind}", f"{own[0]['tokens_held']:,}", *(number(speed.get(name)) for name in names)])
    first = found["rows"][0]
    parts = ["## Several rows", where(found, "batches")]
    parts.append(
        f"Tokens per second of all rows together; {found['shape']} in {found['dtype']}, {first['layers']} layers, "
        f"up to {first['context']:,} tokens in a row, budget {first['budget']:,}:"
    )
    parts.append(table(["rows, prompts", "tokens held", *names], lines))
    return "\n\n".join(parts)


def step_profile(found: Row) -> str:
    """The section of where a step's time goes."""
    lines = [
        [row["label"], number(row["calls"]), number(row["us"]), number(row["floor_us"]), f"{row['share']:.1%}"]
        for row in found["rows"]
    ]
    parts = [
        "## Where the time of a step goes",
        where(found, "step_profile").replace("attnpred bench ", "python -m benchmarks."),
    ]
    parts.append(
        f"Microseconds of one step, {found['shape']} in {found['dtype']}, {found['layers']} layers, {found['context']:,} tokens, "
        f"budget {found['budget']:,}; each part without what it calls of the others. `floor`: the same parts of a step without "
        f"attention. A whole step takes {number(found['step_us'])} with the clocks, {number(found['plain_step_us'])} without."
    )
    parts.append(table(["part", "calls", "predicted", "floor", "share"], lines))
    return "\n\n".join(parts)


def wanted(found: dict[str, Row]) -> str:
    """The section of targets, and what was reached; nothing if none of them was measured."""
    lines = targets(found)
    return f"## Wanted and reached\n\n{table(['what', 'wanted', 'reached'], lines)}" if lines else ""


FIRST: dict[str, Callable[[Row], str]] = {"rivals": rivals}
"""What the page begins with."""
SECTIONS: dict[str, Callable[[Row], str]] = {
    "decode": decode,
    "linear": linear,
    "busy": busy,
    "weights": weights,
    "step_profile": step_profile,
    "attention": attention,
    "selection": selection,
    "batches": batches,
}


def page(folder: Path) -> str:
    """Return the page of what was measured."""
    files = {name: folder / f"{name}.json" for name in FIRST | SECTIONS}
    found = {name: json.loads(file.read_text(encoding="utf-8")) for name, file in files.items() if file.is_file()}
    first, rest = ([table[name](found[name]) for name in table if name in found] for table in (FIRST, SECTIONS))
    parts = [HEAD.strip(), *first, wanted(found), *rest]
    return "\n\n".join(filter(None, parts)) + "\n"


def main(arguments: list[str]) -> int:
    """Write or check the page; return the exit code."""
    text = page(RESULTS)
    if "--check" not in arguments:
        PAGE.write_text(text, encoding="utf-8")
    elif not PAGE.is_file() or PAGE.read_text(encoding="utf-8") != text:
        print("docs/speed.md is out of date: run make docs", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
