"""Write the table of README.md from docs/results/demo.json, so that no figure in it is typed by hand.

The JSON file is a list of what `attnpred demo --json` prints, one object per policy, each with one more key `policy`.
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
    "facts recalled",
    "bits per byte",
    "KV read per step",
    "fast memory",
    "ms per token",
    "attention recovery",
    "recovery ratio",
)


def row(name: str, tokens: int, measured: dict[str, Any], recovery: float | None, ratio: float | None) -> list[str]:
    """Return the cells of one line; a measure that was not taken is a dash."""
    return [
        name,
        f"{tokens:,}",
        f"{measured['correct']} of {measured['total']}",
        f"{measured['bits_per_byte']:.3f}",
        f"{measured['read_bytes_per_step'] / 2**20:.2f} MiB",
        f"{measured['fast_bytes'] / 2**20:.2f} MiB" if "fast_bytes" in measured else "-",
        f"{measured['ms_per_token']:.1f}",
        *("-" if share is None else f"{share:.1%}" for share in (recovery, ratio)),
    ]


def table(runs: list[dict[str, Any]]) -> str:
    """Return the Markdown table: the full cache once, then one line per policy."""
    rows = [row("full cache", runs[0]["context_tokens"], runs[0]["full"], 1.0, None)]
    for run in runs:
        shares = run.get("attention_recovery"), run.get("recovery_ratio")
        rows.append(row(f"`{run['policy']}`", run["budget_tokens"], run["predicted"], *shares))
    head = [list(COLUMNS), ["---", *["---:"] * (len(COLUMNS) - 1)]]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in head + rows)


def written(readme: str, runs: list[dict[str, Any]]) -> str:
    """Return `readme` with the table between its two markers."""
    before, _, rest = readme.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n{table(runs)}\n{END}{after}"


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
