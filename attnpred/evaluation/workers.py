"""Several devices at once: one process for each, with a model of its own; cells are dealt out as processes get free.

Workers measure, and this process alone writes. The full cache of all tasks comes first, because the other rows are compared
with it. A worker that loses its parent leaves: a killed run must not go on by itself.
"""

import multiprocessing
import os
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from typing import Any

from attnpred import hf
from attnpred.evaluation.grid import Grid, attempt, full_of
from attnpred.evaluation.plan import FULL, Cell, Plan
from attnpred.evaluation.rows import Row, RowsFile

_GRID: list[Grid] = []
"""Of a worker process: its one grid."""


def run_on_devices(
    plan: Plan,
    file: RowsFile,
    cells: Sequence[Cell],
    devices: Sequence[str],
    done: Callable[[Cell, str | None], None],
) -> None:
    """Measure `cells` with a process per device and append their rows; `done` is told each, and why it is left out."""
    context = multiprocessing.get_context("spawn")
    free = context.Queue()
    for device in devices:
        free.put(device)
    with ProcessPoolExecutor(len(devices), context, _start, (plan, free, os.getpid())) as pool:
        for is_full in (True, False):
            part = [cell for cell in cells if (cell.variant.label == FULL) == is_full]
            waiting = {pool.submit(_attempt, cell, file.of_cell(full_of(plan, cell))): cell for cell in part}
            for future in as_completed(waiting):
                rows, why = future.result()
                if rows:
                    file.append(rows)
                done(waiting[future], why)


def _start(plan: Plan, free: Any, parent: int) -> None:
    threading.Thread(target=_leave_with, args=(parent,), daemon=True).start()
    model, tokenizer = hf.load_model(plan.model, device=free.get(), dtype=plan.dtype)
    _GRID.append(Grid(plan, model, tokenizer))


def _leave_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)


def _attempt(cell: Cell, full: list[Row]) -> tuple[list[Row], str | None]:
    return attempt(_GRID[0], cell, full)
