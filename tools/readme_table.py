"""Write the tables of README.md from docs/results, so that no figure in it is typed by hand.

demo.json is what `attnpred demo --json` prints, with the policies of `tools.demo_results`; rivals.json what
`attnpred bench rivals --out` writes. `python -m tools.readme_table` writes the tables; `--check` only says (exit code 1)
when they are out of date.
"""

import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "docs" / "results"
README = ROOT / "README.md"
ENGINES = {
    ("attnpred", "int8"): "attnpred, 8-bit weights",
    ("attnpred", "int4"): "attnpred, 4-bit weights",
    ("attnpred", "fp32"): "attnpred, fp32",
    ("transformers", "fp32"): "transformers, fp32",
    ("llama.cpp", "Q8_0"): "llama.cpp, Q8_0",
    ("llama.cpp", "Q4_1"): "llama.cpp, Q4_1",
}
"""What lines of the table of speed there are, by engine and weights."""
COLUMNS = (
    "policy",
    "tokens attended",
    "answers right",
    "KL to the full cache",
    "KV read per step",
    "fast memory",
    "ms per token",
)


def row(column: dict[str, Any]) -> list[str]:
    """Return the cells of one line; what was not measured is a dash."""
    return [
        "full cache" if column["policy"] == "full" else f"`{column['policy']}`",
        f"{column['tokens_attended']:,.0f}",
        f"{column['correct']} of {column['total']}",
        "-" if column["kl"] is None else f"{column['kl']:.3f}",
        f"{column['bytes_per_step'] / 2**20:.1f} MiB",
        f"{column['fast_bytes'] / 2**20:.1f} MiB",
        f"{column['ms_per_token']:.0f}",
    ]


def table(result: dict[str, Any]) -> str:
    """Return what was read, and the Markdown table: one line for each column of the demo."""
    read = (
        f"{result['context_tokens']:,} tokens of {result['text'].removeprefix('a part of ')}, read once in "
        f"{result['read_seconds']:.0f} s; {result['columns'][0]['total']} questions:"
    )
    head = [list(COLUMNS), ["---", *["---:"] * (len(COLUMNS) - 1)]]
    rows = head + [row(column) for column in result["columns"]]
    return read + "\n\n" + "\n".join(f"| {' | '.join(cells)} |" for cells in rows)


def speed(result: dict[str, Any]) -> str:
    """Return a Markdown table of milliseconds per token: a line for each engine, a column for each context."""
    contexts = list(dict.fromkeys(row["context"] for row in result["rows"]))
    lines = [["", *(f"{context:,} tokens" for context in contexts)], ["---", *["---:"] * len(contexts)]]
    for (engine, weights), name in ENGINES.items():
        found = {
            row["context"]: row["ms_per_token"]
            for row in result["rows"]
            if (row["engine"], row["weights"], row["model"]) == (engine, weights, "smollm2")
        }
        if found:
            lines.append([name, *(f"{found[at]:.0f}" if at in found else "-" for at in contexts)])
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def written(readme: str) -> str:
    """Return `readme` with each table between its two markers."""
    for name, (file, render) in TABLES.items():
        begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
        result = json.loads((RESULTS / file).read_text(encoding="utf-8"))
        before, _, rest = readme.partition(begin)
        readme = f"{before}{begin}\n{render(result)}\n{end}{rest.partition(end)[2]}"
    return readme


TABLES = {"speed": ("rivals.json", speed), "table": ("demo.json", table)}
"""What stands between which markers: of which file, by which function."""


def main(arguments: list[str]) -> int:
    """Write or check the tables; return the exit code."""
    text = README.read_text(encoding="utf-8")
    try:
        new = written(text)
    except FileNotFoundError as error:
        print(
            f"got no file {error.filename}, expected what `make results` and `attnpred bench rivals` write",
            file=sys.stderr,
        )
        return 2
    if "--check" not in arguments:
        README.write_text(new, encoding="utf-8")
    elif new != text:
        print("a table of README.md is out of date: run make docs", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
