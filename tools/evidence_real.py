"""Measure what a real model can do with its full cache, and then the policies on that: `python -m tools.evidence_real`.

For each task and length the full cache comes first. Only where the lower end of its 95 % interval is above chance are the
policies run at all; chance is what the right answers to the next document would score. Each text is read once, and every
policy takes that reading in (`attnpred.hf.reading`). Rows go to docs/results/real.jsonl; what is there is not measured
again, so a run that was stopped goes on. `--minutes` ends it at the first cell after so many.

Some tasks read published files, which are too large to come with the repository: `--files FOLDER` says where they are, under
the names that `RUNS` has for them. Without it these tasks are left out.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from attnpred.config import CacheConfig
from attnpred.evaluation.grid import Grid, attempt, full_of, left_over
from attnpred.evaluation.inputs import with_inputs
from attnpred.evaluation.plan import FULL, Cell, Plan, TaskWord
from attnpred.evaluation.rows import Row, RowsFile
from attnpred.evaluation.session import Readings
from attnpred.evaluation.tasks import Example, Task
from attnpred.evaluation.variants import parse_variant
from attnpred.hf import load_model, source_of

OUT = Path(__file__).resolve().parents[1] / "docs" / "results" / "real.jsonl"
FEW, LEADING = "predicted ema quest snapkv streaming", "predicted ema quest"
THIRTEENTH, OTHERS = (1 / 13,), (1 / 8, 1 / 32)
READINGS = 3 << 30


@dataclass(frozen=True, slots=True)
class Run:
    """Some tasks at one length on one model; a task that reads a file is written `NAME=FILE`."""

    model: str
    length: int
    tasks: str
    documents: int
    policies: str = FEW
    budgets: tuple[float, ...] = THIRTEENTH
    steps: int = 128
    chat: bool = False

    def words(self, files: Path | None) -> tuple[TaskWord, ...]:
        """Return the tasks that can be run with `files`; a row knows a file by its name alone, wherever it lies."""
        split = [word.partition("=") for word in self.tasks.split()]
        return tuple(
            TaskWord(f"{name}{equals}{file}", name, (str(files / file),) if files and file else ())
            for name, equals, file in split
            if files or not file
        )

    def plan(self, files: Path | None = None) -> Plan:
        """Return it as the grid takes it."""
        return Plan(
            model=self.model,
            tasks=self.words(files),
            variants=tuple(parse_variant(word) for word in (FULL, *self.policies.split())),
            budgets=tuple(round(share, 6) for share in self.budgets),
            lengths=(self.length,),
            config=CacheConfig(budget=1.0),
            seed=5,
            documents=self.documents,
            steps=self.steps,
            chat=self.chat,
        )


EASY = "passkey needle niah_single_1 niah_single_2 niah_multikey_1"
HARD = "niah_single_3 niah_multivalue niah_multiquery niah_multikey_2 niah_multikey_3 lookup vt facts_turns"
SOLVED = "passkey needle niah_single_1"
RUNS = (
    Run("smollm2", 2048, EASY, 4),
    Run("smollm2", 4096, SOLVED, 4),
    Run("smollm2", 4096, "agreement", 3, f"{FEW} oracle", steps=64),
    Run("gemma3-270m", 4096, "needle passkey", 4),
    Run("smollm2", 2048, HARD, 4),
    Run("smollm2", 2048, "gsm8k=gsm8k_test.jsonl", 10),
    Run("smollm2", 8000, "passkey", 3),
    Run("gemma3-270m", 16384, "needle", 3),
    Run("smollm2", 4096, "passkey needle", 4, LEADING, OTHERS),
    Run("smollm2", 4096, "longbench=longbench_multi_news.jsonl", 2, LEADING, chat=True),
    Run("smollm2", 8000, "niah_single_1", 3),
    Run("smollm2", 4096, SOLVED, 4, LEADING, OTHERS),
    Run("smollm2", 2048, EASY, 4, LEADING, OTHERS[:1]),
    Run("gemma3-270m", 4096, "needle passkey", 4, LEADING, OTHERS),
)
"""Breadth first. 1/32 of 2,048 tokens would be less than sinks, recent tokens and two blocks."""


def groups(plan: Plan) -> Iterator[list[Cell]]:
    """Yield the cells of each task: the full cache, then budget after budget."""
    for task in plan.tasks:
        cells = [cell for cell in plan.cells() if cell.task == task]
        order = (1.0, *plan.budgets)
        yield sorted(cells, key=lambda cell: (cell.variant.label != FULL, order.index(cell.budget)))


def chance(task: Task, examples: Sequence[Example]) -> float:
    """Return what the right answers to the next document score: a good answer that knows nothing of its own.

    0 for a single document, and where a score is no share of right answers.
    """
    if len(examples) < 2 or task.lower_is_better:
        return 0.0
    pairs = zip(examples, [*examples[1:], examples[0]], strict=True)
    asked = [both for one, other in pairs for both in zip(one.questions, other.questions, strict=False)]
    return statistics.fmean(task.score(" ".join(other.answers[:1]), question) for question, other in asked)


@lru_cache
def tokenizer_of(model: str) -> Any:
    """Return the tokenizer of a model by name."""
    return AutoTokenizer.from_pretrained(source_of(model))


def can(row: Row) -> bool:
    """Return whether the full cache is above chance in `row`."""
    return bool(row["lower_is_better"] or row["interval"][0] > row.get("chance", 0.0))


def measure(run: Run, file: RowsFile, until: float, files: Path | None = None) -> bool:
    """Measure what is left of `run`; return whether there was time for all of it."""
    plan, grid = with_inputs(run.plan(files), tokenizer_of(run.model)), None
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
            rows, why = attempt(grid, cell, file.of_cell(full_of(plan, cell)))
            if rows:
                guessed = chance(cell.task.make(), grid.examples(cell))
                file.append([row | {"chance": guessed} for row in rows])
            _tell(run, cell, why or f"{rows[0]['value']:.3f} in {time.monotonic() - start:.0f} s")
    return True


def _tell(run: Run, cell: Cell, what: str) -> None:
    label = f"{cell.task.word} {cell.variant.label} {cell.budget:.3f}"
    print(f"{run.model} {run.length} {label}: {what}", file=sys.stderr, flush=True)


def _is_full(row: Row, plan: Plan, cell: Cell) -> bool:
    key = plan.key(cell)
    return all(row.get(name) == key[name] for name in ("model", "policy", "task", "length", "seed", "inputs"))


def main(arguments: list[str]) -> int:
    """Measure all that is left; return the exit code: 1 if the time was up before."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin no cell after so many")
    parser.add_argument("--model", help="only the runs of this one")
    parser.add_argument("--files", type=Path, help="folder of the files that some tasks read")
    parser.add_argument("--out", type=Path, default=OUT)
    chosen = parser.parse_args(arguments)
    until = time.monotonic() + 60 * chosen.minutes
    file = RowsFile(chosen.out)
    runs = [run for run in RUNS if chosen.model in (None, run.model)]
    for word in dict.fromkeys(word for run in runs for word in run.tasks.split() if "=" in word):
        path = chosen.files and chosen.files / word.partition("=")[2]
        if path is None:
            print(f"{word}: left out, as there is no --files", file=sys.stderr)
        elif not path.is_file():
            parser.error(f"got --files {chosen.files}, expected {path.name} in it")
    with file.claimed():
        return 0 if all(measure(run, file, until, chosen.files) for run in runs) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
