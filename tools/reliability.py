"""Inject faults of every kind, and write docs/reliability.md from what became of them: no figure in it is typed by hand.

    python -m tools.reliability                 some minutes; figures go to docs/results/reliability.json
    python -m tools.reliability --page          write the page from the figures that are there; --check compares it

The matrices are those of the tests (tests/reliability, tests/cli/matrix.py), with larger counts. Exit code 1 if anything was
wrong, or a checked page is out of date.
"""

import argparse
import json
import sys
import tempfile
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from tools.speed_tables import table

ROOT = Path(__file__).resolve().parents[1]
FIGURES, PAGE = ROOT / "docs" / "results" / "reliability.json", ROOT / "docs" / "reliability.md"
TITLE = """# Reliability

Written by `python -m tools.reliability`, which injects the faults and counts what becomes of them. Do not edit. `make test`
runs a small sample of each table.

- **survived**: the file, or the answer, is exactly what it is without the fault.
- **refused**: one line says what is wrong and what to do; in Python an error of `attnpred.errors`, at the command line exit
  code 2. Nothing was lost that was there before.
- **wrong**: anything else: other tokens, weights or rows without a word, a traceback, a file or thread left behind."""
HEADS = {
    "kill": """## Killed while writing

A process that writes without end is killed (`SIGKILL`) at a random moment, on a disk that is slow and takes a part of a write
at a time. The old file or the new one must be there, whole, with all that the writer was told is written, and the next
writer must remove what the dead one left. *Midway*: kills that left a half-written file.""",
    "flip": """## Damaged files

A file is damaged at a random place, then used. A scratch file of the disk tier is damaged between two tokens. What is
compared: of caches the logits of a sparse step and of a call that reads every block, bit by bit; of predictors all weights
and settings; of rows every row, read as `eval` and as `report` do. A file of rows that was cut off keeps its whole cells; the
others are measured again.""",
    "soak": """## Many calls

Calls in one process, each of a random policy, prompt and slow tier. What they do, and what is done to them, stands in the
table; the tokens must be those of a plain `generate` with that policy and prompt.""",
    "command_line": """## Bad input on the command line

Every command with every bad number, word, file, output and row (`tests/cli/matrix.py`): exit code 2 and one line that says
what was expected, before any long work.""",
}


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Run the matrices that are wanted; return their figures."""
    from tests.cli.matrix import cases
    from tests.cli.matrix_run import run_all
    from tests.reliability.flip import flips
    from tests.reliability.kill import kills
    from tests.reliability.soak import soak

    torch.set_num_threads(1)  # the writers are forks
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        figures: dict[str, Any] = {
            "seed": args.seed,
            "versions": {package: version(package) for package in ("torch", "transformers")},
        }
        for kind in args.only or HEADS:
            (folder / kind).mkdir()
            if kind == "soak":
                outcomes, middle, end = soak(folder / kind, args.calls, args.seed)
                figures["held"] = {"middle": asdict(middle), "end": asdict(end)}
            elif kind == "kill":
                outcomes = kills(folder / kind, args.kills, args.seed)
            elif kind == "flip":
                outcomes = flips(folder / kind, args.flips, args.seed)
            else:
                outcomes = run_all(cases(folder / kind))
            figures[kind] = [outcome.as_dict() for outcome in outcomes]
    return figures


def page(figures: dict[str, Any]) -> str:
    """Return the page."""
    parts = [TITLE, total(figures)]
    for kind, head in HEADS.items():
        parts += [head, outcome_table(figures[kind], kind == "kill")]
        if kind == "soak":
            parts.append(held(figures["held"]))
        parts += [f"Wrong: {words}" for row in figures[kind] for words in row["wrong_ones"]]
    return "\n\n".join(parts) + "\n"


def total(figures: dict[str, Any]) -> str:
    """Return the line with the sums of everything."""
    rows = [row for kind in HEADS for row in figures[kind]]
    sums = {name: sum(row[name] for row in rows) for name in ("injected", "survived", "refused", "wrong")}
    versions = ", ".join(f"{package} {number}" for package, number in figures["versions"].items())
    return (
        f"In all {sums['injected']:,} cases: {sums['survived']:,} survived, {sums['refused']:,} refused, "
        f"**{sums['wrong']:,} wrong** ({versions}; seed {figures['seed']})."
    )


def outcome_table(rows: list[dict[str, Any]], with_midway: bool) -> str:
    """Return the table of one matrix, and its sums."""
    names = ["injected", *(["midway"] if with_midway else []), "survived", "refused", "wrong"]
    lines = [[row["what"], *(f"{row[name]:,}" for name in names)] for row in rows]
    lines.append(["all", *(f"{sum(row[name] for row in rows):,}" for name in names)])
    return table(["", *names], lines)


def held(figures: dict[str, dict[str, int]]) -> str:
    """Return what the process of the soak held after half of its calls, and at the end."""
    lines = [
        [when, str(one["threads"]), str(one["files_open"]), str(one["files_left"]), f"{one['memory'] / 2**20:.0f} MiB"]
        for when, one in (("after half of the calls", figures["middle"]), ("at the end", figures["end"]))
    ]
    return table(["", "threads", "open files", "files left behind", "memory"], lines)


def main(arguments: list[str]) -> int:
    """Measure and write, or write, or check; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100, help="of each kind of file")
    parser.add_argument("--flips", type=int, default=40, help="of each kind of file and damage")
    parser.add_argument("--calls", type=int, default=400, help="of the soak")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="+", choices=HEADS, help="measure these anew, keep the others' figures")
    parser.add_argument("--page", action="store_true", help="measure nothing")
    parser.add_argument("--check", action="store_true", help="measure and write nothing")
    args = parser.parse_args(arguments)
    if not args.page and not args.check:
        known = json.loads(FIGURES.read_text(encoding="utf-8")) if args.only else {}
        FIGURES.write_text(json.dumps(known | measure(args), indent=1) + "\n", encoding="utf-8")
    figures = json.loads(FIGURES.read_text(encoding="utf-8"))
    text = page(figures)
    if not args.check:
        PAGE.write_text(text, encoding="utf-8")
    elif not PAGE.is_file() or PAGE.read_text(encoding="utf-8") != text:
        print("docs/reliability.md is out of date: run make docs", file=sys.stderr)
        return 1
    return int(any(row["wrong"] for kind in HEADS for row in figures[kind]))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
