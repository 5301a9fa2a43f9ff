"""Write the table of README.md from docs/results/demo.json, so that no figure in it is typed by hand.

The JSON file is what `attnpred demo --json` prints, with the policies of `tools.demo_results`.
`python -m tools.readme_table` writes the table; `--check` only says (exit code 1) when it is out of date.
"""

import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "docs" / "results" / "demo.json"
README = ROOT / "README.md"
BEGIN, END = "<!-- table:begin -->", "<!-- table:end -->"
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


def written(readme: str, result: dict[str, Any]) -> str:
    """Return `readme` with the table between its two markers."""
    before, _, rest = readme.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n{table(result)}\n{END}{after}"


def main(arguments: list[str]) -> int:
    """Write or check the table; return the exit code."""
    if not RESULTS.is_file():
        print(f"got no file {RESULTS.relative_to(ROOT)}, expected the JSON of `attnpred demo --json`", file=sys.stderr)
        return 2
    text = README.read_text(encoding="utf-8")
    new = written(text, json.loads(RESULTS.read_text(encoding="utf-8")))
    if "--check" not in arguments:
        README.write_text(new, encoding="utf-8")
    elif new != text:
        print("the table of README.md is out of date: run make docs", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
