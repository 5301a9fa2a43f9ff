"""The grid: measures cell after cell of a `Plan`, each becomes one row or a few (`attnpred.evaluation.rows`).

A row says what came out (`value`, `interval`, `items`), how it compares with the full cache on the same items
(`against_full`), what it cost (`attnpred.evaluation.session`), and what made it: versions, commit, machine, seed, config.
What `--recovery` adds looks at every key, so it is a run of its own over the first document, and is neither timed nor
counted.
"""

import contextlib
import dataclasses
import time
import traceback
from collections.abc import Callable, Iterable, Sequence
from typing import Any, final

import torch

from attnpred import hf
from attnpred.config import CacheConfig
from attnpred.errors import AttnpredError, ConfigError
from attnpred.evaluation.inputs import documents, with_inputs
from attnpred.evaluation.plan import FULL, Cell, Plan, TaskWord, plain
from attnpred.evaluation.provenance import provenance
from attnpred.evaluation.rows import Row, RowsFile, as_json, key_of
from attnpred.evaluation.session import PolicySession, Readings
from attnpred.evaluation.statistics import bootstrap, difference
from attnpred.evaluation.tasks import Example, Measured
from attnpred.evaluation.variants import parse_variant
from attnpred.policies.base import Policy

LONGEST_TEXT = 200
"""Characters of an answer that a row keeps."""
IN_MEMORY: dict[str, Any] = dict.fromkeys(("offload", "offload_dir", "offload_dtype", "host_limit", "disk_limit"))


def check(plan: Plan, model_config: Any) -> None:
    """Make every policy with every budget. Raises `AttnpredError` for one that cannot be had."""
    for cell in plan.cells():
        policy, _ = cell.variant.make(model_config, config_of(plan, cell))
        if cell.task.make().replays and policy.is_dense:
            raise ConfigError(
                f"got policy {cell.variant.label!r} for task {cell.task.word!r}, expected one that selects blocks: leave it out"
            )


def config_of(plan: Plan, cell: Cell) -> CacheConfig:
    """Return the settings of a cell's cache, before its policy's own."""
    return dataclasses.replace(plan.config, budget=cell.budget, dense_when_fits=not cell.task.make().replays)


@final
class Grid:
    """A plan on one device: the model, packed for good if the plan says so, the documents made last, and what was read.

    plan: the one that was given, its inputs named. Raises `ConfigError` if a task cannot make its documents.
    """

    def __init__(self, plan: Plan, model: Any, tokenizer: Any, readings: Readings | None = None) -> None:
        self.plan, self.model, self.tokenizer = with_inputs(plan, tokenizer), model, tokenizer
        self.readings = readings
        self._examples: tuple[TaskWord, int, list[Example]] | None = None
        if plan.weights is not None:
            hf.pack_weights(model, plan.weights)
        self._made_by = provenance(str(model.device))

    def check_policies(self) -> None:
        """Attach every policy once. Raises `AttnpredError`: nothing long has begun yet."""
        for cell in self.plan.cells():
            if cell.length == self.plan.lengths[0] and cell.task == self.plan.tasks[0]:
                policy, settings = cell.variant.make(self.model.config, config_of(self.plan, cell))
                hf.attach(self.model, policy=policy, config=settings).detach()

    def rows(self, cell: Cell, full: Sequence[Row] = ()) -> list[Row]:
        """Measure a cell; return its rows, compared with those of the full cache. Raises `AttnpredError`."""
        start = time.perf_counter()
        task, examples = cell.task.make(), self.examples(cell)
        policy, settings = cell.variant.make(self.model.config, config_of(self.plan, cell))
        session = PolicySession(self.model, self.tokenizer, policy, settings, self.readings)
        with contextlib.nullcontext() if task.replays else session:
            measured = task.measure(session, examples, self.plan.limit)
        if not all(one.items for one in measured):
            raise ConfigError(f"got no items from task {cell.task.word!r}, expected some: give it more documents")
        recovery: dict[str, float | None] = {"recovery": None, "recovery_ratio": None}
        if self.plan.recovery and not task.replays:
            recovery |= self._recovery(cell, examples[0])
        costs = session.costs() | recovery
        seconds = time.perf_counter() - start
        before = {item["name"]: item["value"] for row in full for item in row["items"]}
        return [self._row(cell, one, policy, settings, costs, seconds, before) for one in measured]

    def examples(self, cell: Cell) -> list[Example]:
        """Return the documents of a cell's task and length, prepared with the full cache."""
        if self._examples is None or self._examples[:2] != (cell.task, cell.length):
            task = cell.task.make()
            made = documents(self.plan, self.tokenizer, cell.task, cell.length)
            policy, settings = parse_variant(FULL).make(self.model.config, config_of(self.plan, cell))
            session = PolicySession(self.model, self.tokenizer, policy, settings, self.readings)
            with contextlib.nullcontext() if task.replays else session:
                made = [task.prepare(session, example) for example in made]
            self._examples = cell.task, cell.length, made
        return self._examples[2]

    def _recovery(self, cell: Cell, example: Example) -> dict[str, float]:
        policy, settings = cell.variant.make(self.model.config, config_of(self.plan, cell))
        settings = dataclasses.replace(settings, **IN_MEMORY, measure_recovery=True)
        with PolicySession(self.model, self.tokenizer, policy, settings) as session:
            list(cell.task.make().run(session, example))
            return session.recovery()

    def _row(
        self,
        cell: Cell,
        measured: Measured,
        policy: Policy[Any],
        settings: CacheConfig,
        costs: dict[str, Any],
        seconds: float,
        full: dict[str, float],
    ) -> Row:
        task, items = cell.task.make(), measured.items
        values = torch.tensor([item.value for item in items], dtype=torch.float64, device="cpu")
        if not bool(values.isfinite().all()):
            raise ConfigError(
                f"got {task.metric} {float(values.mean())} from task {cell.task.word!r}, expected a finite one: the model's own "
                "numbers overflow; give it another dtype"
            )
        base = self.plan.config
        row = self.plan.key(cell) | {
            "metric": task.metric,
            "lower_is_better": task.lower_is_better,
            "value": float(values.mean()),
            "interval": bootstrap(values),
            "n": len(items),
            "against_full": _against({item.name: item.value for item in items}, full),
            **costs,
            "kind": policy.kind,
            "granularity": _granularity(policy, settings),
            "calibration": base.calibration_interval,
            "block_size": settings.block_size,
            "sink_tokens": base.num_sink_tokens,
            "recent_tokens": base.recent_window,
            "steps": self.plan.steps,
            "config": {name: plain(value) for name, value in dataclasses.asdict(settings).items()},
            "policy_fields": _fields(policy),
            "dtype": str(self.model.dtype).removeprefix("torch."),
            **self._made_by,
            "seconds": round(seconds, 3),
        }
        shown = [dataclasses.asdict(item) | {"text": item.text[:LONGEST_TEXT]} for item in items]
        return as_json(row | measured.figures | {"items": shown})


def _against(values: dict[str, float], full: dict[str, float]) -> dict[str, Any] | None:
    compared = difference(values, full)
    return compared if compared["n"] else None


def left_over(plan: Plan, rows: Iterable[Row]) -> list[Cell]:
    """Return the cells of which `rows` has nothing."""
    done = {key_of(row) for row in rows}
    return [cell for cell in plan.cells() if key_of(plan.key(cell)) not in done]


def full_of(plan: Plan, cell: Cell) -> str:
    """Return the key (`rows.key_of`) of the full cache's cell that `cell` is compared with; "" for that cell itself."""
    if cell.variant.label == FULL:
        return ""
    return key_of(plan.key(dataclasses.replace(cell, variant=parse_variant(FULL), budget=1.0)))


def run_cells(grid: Grid, file: RowsFile, cells: Iterable[Cell], done: Callable[[Cell, str | None], None]) -> None:
    """Measure `cells` and append their rows; `done` is told each, and why it was left out if it was."""
    for cell in cells:
        rows, why = attempt(grid, cell, file.of_cell(full_of(grid.plan, cell)))
        if rows:
            file.append(rows)
        done(cell, why)


def attempt(grid: Grid, cell: Cell, full: Sequence[Row] = ()) -> tuple[list[Row], str | None]:
    """Measure a cell; return its rows, and none and why where it could not be measured."""
    try:
        return grid.rows(cell, full), None
    except AttnpredError as error:
        return [], " ".join(str(error).split())
    except Exception as error:  # a bug: shown whole, but a night's other cells are not lost for it
        traceback.print_exc()
        return [], f"{type(error).__name__}, a bug: see above"


def _granularity(policy: Policy[Any], settings: CacheConfig) -> str:
    if policy.is_dense:
        return "all"
    return "token" if settings.block_size == 1 else f"block {settings.block_size}"


def _fields(policy: Any) -> dict[str, Any]:
    """Return a policy's hyper-parameters; of anything that is no plain value, the name of its type."""
    found = {field.name: plain(getattr(policy, field.name)) for field in dataclasses.fields(policy)}
    if policy.predictor_kind:
        found["predictor"] = dataclasses.asdict(policy.predictor.config)
    kept = (bool, int, float, str, list, dict, type(None))
    return {name: value if isinstance(value, kept) else type(value).__name__ for name, value in found.items()}
