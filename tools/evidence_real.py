"""Measure what a real model can do with its full cache, and then the policies on that: `python -m tools.evidence_real`.

For each task and length the full cache comes first. Only where the lower end of its 95 % interval is above chance (0: nobody
guesses a number of five digits) are the policies run at all. Each text is read once, and every policy takes that reading in
(`attnpred.hf.reading`). Rows go to docs/results/real.jsonl; what is there is not measured again, so a run that was stopped
goes on. `--minutes` ends it at the first cell after so many.
"""

import argparse
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from attnpred.config import CacheConfig
from attnpred.evaluation.grid import Grid, left_over, run_cells
from attnpred.evaluation.plan import FULL, Cell, Plan, parse_task
from attnpred.evaluation.rows import Row, RowsFile
from attnpred.evaluation.session import Readings
from attnpred.evaluation.variants import parse_variant
from attnpred.hf import load_model

OUT = Path(__file__).resolve().parents[1] / "docs" / "results" / "real.jsonl"
FEW, ALL = "predicted ema quest snapkv streaming", "predicted ema quest snapkv h2o streaming oracle"
THIRTEENTH, OTHERS = (1 / 13,), (1 / 8, 1 / 32)
CHANCE = 0.0
READINGS = 3 << 30


@dataclass(frozen=True, slots=True)
class Run:
    """Some tasks at one length on one model."""

    model: str
    length: int
    tasks: str
    documents: int
    policies: str = ALL
    budgets: tuple[float, ...] = THIRTEENTH

    def plan(self) -> Plan:
        """Return it as the grid takes it."""
        return Plan(
            model=self.model,
            tasks=tuple(map(parse_task, self.tasks.split())),
            variants=tuple(parse_variant(word) for word in (FULL, *self.policies.split())),
            budgets=tuple(round(share, 6) for share in self.budgets),
            lengths=(self.length,),
            config=CacheConfig(budget=1.0),
            seed=5,
            documents=self.documents,
        )


EASY = "passkey needle niah_single_1 niah_single_2 niah_multikey_1"
HARD = "niah_single_3 niah_multivalue niah_multiquery niah_multikey_2 niah_multikey_3 lookup vt facts_turns"
RUNS = (
    Run("smollm2", 2048, EASY, 4, FEW),
    Run("smollm2", 2048, HARD, 4, FEW),
    Run("smollm2", 4096, "passkey needle niah_single_1", 4, FEW),
    Run("smollm2", 8000, "passkey niah_single_1", 4, FEW),
    Run("gemma3-270m", 4096, "needle passkey", 4, FEW),
    Run("gemma3-270m", 16384, "needle", 4, FEW),
    Run("smollm2", 2048, EASY, 4, budgets=(*THIRTEENTH, OTHERS[0])),
    Run("smollm2", 4096, EASY, 4, budgets=(*THIRTEENTH, *OTHERS)),
    Run("smollm2", 8000, EASY, 4, budgets=(*THIRTEENTH, *OTHERS)),
)
"""Breadth first. 1/32 of 2,048 tokens would be less than sinks, recent tokens and two blocks."""


def groups(plan: Plan) -> Iterator[list[Cell]]:
    """Yield the cells of each task: the full cache, then budget after budget."""
    for task in plan.tasks:
        cells = [cell for cell in plan.cells() if cell.task == task]
        order = (1.0, *plan.budgets)
        yield sorted(cells, key=lambda cell: (cell.variant.label != FULL, order.index(cell.budget)))


def can(row: Row) -> bool:
    """Return whether the full cache is above chance in `row`."""
    return bool(row["interval"][0] > CHANCE)


def measure(run: Run, file: RowsFile, until: float) -> bool:
    """Measure what is left of `run`; return whether there was time for all of it."""
    plan, grid = run.plan(), None
    for cells in groups(plan):
        for cell in cells:
            full = [row for row in file.rows if _is_full(row, plan, cells[0])]
            is_wanted = cell.variant.label == FULL or (full and can(full[-1]))
            if not is_wanted or cell not in left_over(plan, file.rows):
                continue
            if time.monotonic() > until:
                return False
            if grid is None:
                grid = Grid(plan, *load_model(plan.model), Readings(READINGS))
            start = time.monotonic()
            run_cells(grid, file, [cell], lambda one, why: _tell(run, one, why or f"{time.monotonic() - start:.0f} s"))  # noqa: B023
    return True


def _tell(run: Run, cell: Cell, what: str) -> None:
    label = f"{cell.task.word} {cell.variant.label} {cell.budget:.3f}"
    print(f"{run.model} {run.length} {label}: {what}", file=sys.stderr, flush=True)


def _is_full(row: Row, plan: Plan, cell: Cell) -> bool:
    key = plan.key(cell)
    return all(row[name] == key[name] for name in ("model", "policy", "task", "length", "seed"))


def main(arguments: list[str]) -> int:
    """Measure all that is left; return the exit code: 1 if the time was up before."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin no cell after so many")
    parser.add_argument("--model", help="only the runs of this one")
    parser.add_argument("--out", type=Path, default=OUT)
    chosen = parser.parse_args(arguments)
    until = time.monotonic() + 60 * chosen.minutes
    file = RowsFile(chosen.out)
    runs = [run for run in RUNS if chosen.model in (None, run.model)]
    with file.claimed():
        return 0 if all(measure(run, file, until) for run in runs) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
