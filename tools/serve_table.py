"""Write the table of docs/serve.md from docs/results/serve.json, which `attnpred bench serve --out` writes.

`python -m tools.serve_table` writes it; `--check` only says (exit code 1) when it is out of date.
"""

import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULT = ROOT / "docs" / "results" / "serve.json"
PAGE = ROOT / "docs" / "serve.md"
BEGIN, END = "<!-- table:begin -->", "<!-- table:end -->"
NAMES = {"attnpred": "`attnpred serve`", "transformers": "`transformers serve`"}
COLUMNS = (
    "server",
    "streams",
    "tokens/s, the prompts included",
    "first token, unread",
    "read before",
    "after a restart",
    "first token of the streams, median",
    "between tokens, median and 99 %",
    "memory, and what was admitted",
)


def row(one: dict[str, Any]) -> list[str]:
    """Return the cells of one line; what was not measured is a dash."""
    again = one.get("first_restart_s") if one["engine"] == "attnpred" else None
    admitted = f", {one['admitted_mib']:,} MiB" if one["admitted_mib"] else ""
    return [
        NAMES[one["engine"]],
        str(one["streams"]),
        f"{one['tokens'] / one['seconds']:.1f}",
        f"{one['first_cold_s']:.1f} s",
        f"{one['first_again_s']:.1f} s",
        "-" if again is None else f"{again:.1f} s",
        f"{one['first_p50_s']:.1f} s",
        f"{one['gap_p50_ms']:.0f}, {one['gap_p99_ms']:.0f} ms",
        f"{one['memory_mib']:,} MiB{admitted}",
    ]


def table(result: dict[str, Any]) -> str:
    """Return what was measured, and the Markdown table."""
    first = result["rows"][0]
    said = (
        f"{first['model']}, a document of {first['context']:,} tokens, {result['tokens']} new tokens of each stream, policy "
        f"`{result['policy']}`, budget {result['budget']}; {result['cpu']}, {result['threads']} threads. The machine did other "
        f"work meanwhile (load {result['load']:.0f}), so only what stands beside each other compares."
    )
    head = [list(COLUMNS), ["---", *["---:"] * (len(COLUMNS) - 1)]]
    rows = head + [row(one) for one in result["rows"]]
    return said + "\n\n" + "\n".join(f"| {' | '.join(cells)} |" for cells in rows)


def page(text: str, result: dict[str, Any]) -> str:
    """Return the page with its table."""
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n{table(result)}\n{END}{after}"


def main(arguments: list[str]) -> int:
    """Write or check the page; return the exit code."""
    text = PAGE.read_text(encoding="utf-8")
    wanted = page(text, json.loads(RESULT.read_text(encoding="utf-8")))
    if "--check" not in arguments:
        PAGE.write_text(wanted, encoding="utf-8")
    elif wanted != text:
        print("docs/serve.md is out of date: run make docs", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
