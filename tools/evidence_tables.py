"""Write docs/evidence.md, the paper's claims beside what this project measured: no figure in it is typed by hand.

`tools.evidence` makes the rows (`tools.recovery_results` those of recovery, `tools.evidence_real` those of real models).
`python -m tools.evidence_tables` writes the page, and `--check` only says (exit code 1) when it is out of date. What the
paper says, and where, is in `CLAIMS`.
"""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from tools import real_tables
from tools.policy_claims import Row
from tools.policy_tables import ROOT, _shown, load, notice
from tools.speed_tables import table

PAGE: Path = ROOT / "docs" / "evidence.md"
LOSS = 0.005
EMA = "ema:rate=0.1,calibration_interval=5"
TITLE = """# Evidence

Written by `make docs` from `docs/results`. Do not edit."""
HEAD = """## The paper's claims, on the model that comes with this project

What AttentionPredictor (arXiv 2502.04077) claims, beside what this project measures on the model that it ships: a language
model of 5 million parameters, at 4,096 and 8,192 tokens. It can copy what it has read, and it cannot reason, so the tasks are
those that it can do with its full cache. The commands are those of `tools/evidence.py`; put a model of your own in the
place of `demo` for the paper's tasks (`docs/howto.md`). Every difference is paired by item, with its 95 % interval."""


@dataclass(frozen=True, slots=True)
class Shown:
    """What a run shows of a claim: in a few words, and in a table."""

    short: str
    table: str


def compression(rows: Sequence[Row]) -> Shown:
    """Return the largest compression at which neither facts nor bits per byte lose more than `LOSS`."""
    full = {row["task"]: row for row in rows if row["policy"] == "full"}
    lines, best = [], None
    for budget in sorted({row["budget"] for row in rows if row["policy"] == "predicted"}, reverse=True):
        own = {row["task"]: row for row in rows if row["policy"] == "predicted" and row["budget"] == budget}
        if not {"facts4", "perplexity"} <= set(own):
            continue
        lost = 1 - own["facts4"]["value"] / full["facts4"]["value"]
        worse = own["perplexity"]["value"] / full["perplexity"]["value"] - 1
        times = own["facts4"]["compression"]
        if max(lost, worse) < LOSS:
            best = max(best or 0.0, times)
        lines.append(
            [f"{times:.1f} times", f"{0.0 - lost:+.1%}", _shown(own["facts4"]["against_full"]), f"{worse:+.2%}"]
        )
    head = ["compression", "right answers", "difference, per question", "bits per byte"]
    return Shown(f"{best:.1f} times" if best else "none", table(head, lines))


def needle(rows: Sequence[Row]) -> Shown:
    """Return what each policy retrieves of the needles at each length."""
    lengths = sorted({row["length"] for row in rows})
    cells = {(row["policy"], row["length"]): f"{row['value']:.0%}" for row in rows}
    names = dict.fromkeys(row["policy"] for row in rows)
    lines = [[f"`{name}`", *(cells.get((name, length), "-") for length in lengths)] for name in names]
    ours = [cells[name, length] for name, length in cells if name == "predicted"]
    return Shown(
        " and ".join(dict.fromkeys(ours)), table(["policy", *(f"{length:,} tokens" for length in lengths)], lines)
    )


def chain(rows: Sequence[Row]) -> Shown:
    """Return what is right in long outputs, and against the full cache."""
    lines = [
        [f"`{row['policy']}`", f"{row['value']:.2f}", _shown(row["against_full"]) if row.get("against_full") else "-"]
        for row in rows
    ]
    ours, quest = (next(row["value"] for row in rows if row["policy"] == name) for name in ("predicted", "quest"))
    return Shown(f"{ours:.2f} against Quest's {quest:.2f}", table(["policy", "right", "against the full cache"], lines))


@dataclass(frozen=True, slots=True)
class Claim:
    """What the paper says, its figure and where it stands, the run that shows it here, and what to make of it."""

    what: str
    paper: str
    place: str
    run: str
    shown: Callable[[Sequence[Row]], Shown]
    remark: str


CLAIMS = (
    Claim("compression at under 0.5 % loss", "13 times", "abstract", "compression", compression, "Facts and book text are measured here, not LongBench."),
    Claim("needles at 1/64 of the cache", "100 %", "figure 6", "needle", needle, "1/64 is four or eight blocks of each head."),
    Claim("long outputs at a budget of 0.13", "76.7 % against Quest's 43.3 %", "AIME24, figure 4", "chain", chain, "The model follows a chain of facts, and does no reasoning; its format was chosen by scores of the full cache on this book."),
)  # fmt: skip


def page() -> str:
    """Return the page; a run that was not made has a dash."""
    lines, parts = [], []
    for claim in CLAIMS:
        rows = load(claim.run)
        shown = claim.shown(rows) if rows else Shown("-", "")
        lines.append([claim.what, claim.paper, shown.short])
        said = f"### {claim.what[0].upper()}{claim.what[1:]}\n\nThe paper's figure: {claim.paper} ({claim.place}). {claim.remark}"
        parts += [said, shown.table] if rows else []
    claims = table(["claim", "in the paper", "`predicted` here"], lines)
    said = notice([row for claim in CLAIMS for row in load(claim.run)])
    return "\n\n".join(part for part in (TITLE, real_tables.section(), HEAD, said, claims, *parts) if part) + "\n"


def main(arguments: list[str]) -> int:
    """Write or check the page; return the exit code."""
    text = page()
    if "--check" not in arguments:
        PAGE.write_text(text, encoding="utf-8")
    elif not PAGE.is_file() or PAGE.read_text(encoding="utf-8") != text:
        print("docs/evidence.md is out of date: run make docs", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
