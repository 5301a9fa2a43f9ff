"""What the grid is to measure: task x length x (the full cache, then policy x budget), as cells in the order they run."""

import dataclasses
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from attnpred import checks
from attnpred.config import CacheConfig
from attnpred.errors import ConfigError
from attnpred.evaluation.tasks import TASKS, Task, Wanted
from attnpred.evaluation.tasks.hub import is_hub_name
from attnpred.evaluation.tasks.recovery import KINDS
from attnpred.evaluation.variants import Variant, parse_variant
from attnpred.reading import can_be_written

FULL = "full"
DOCUMENTS = 8
"""Of one cell, unless told otherwise; a file gives all it has."""
FIRST_DEFAULTS = {"num_sink_tokens": 64, "recent_window": 64, "dense_layers": 2}
"""What these settings were when rows were first written. A row names what differs from that, so that a default that changes
does not make other rows of those that are there.
"""


@dataclass(frozen=True, slots=True)
class TaskWord:
    """A task as it is named on the command line: `facts4`, `gsm8k=FILE`, `perplexity=FILE+FILE`."""

    word: str
    name: str
    files: tuple[str, ...]

    def make(self) -> Task:
        """Return the task."""
        return TASKS[self.name]()


@dataclass(frozen=True, slots=True)
class Cell:
    """One measurement."""

    task: TaskWord
    length: int
    variant: Variant
    budget: int | float


@dataclass(frozen=True, slots=True)
class Plan:
    """All of a run but for where it runs and where its rows go. documents, limit: None is no choice, and no limit.

    full: measure the full cache beside everything. recovery: measure attention recovery apart. config: of every policy,
    unless its word says otherwise; the budget is the cell's. dtype: of the weights; weights: what they are packed in.
    inputs: the hash of the documents of each task and length (`attnpred.evaluation.inputs`), which a key needs.
    """

    model: str
    tasks: tuple[TaskWord, ...]
    variants: tuple[Variant, ...]
    budgets: tuple[int | float, ...]
    lengths: tuple[int, ...]
    config: CacheConfig
    dtype: str = "auto"
    weights: str | None = None
    seed: int = 0
    documents: int | None = None
    steps: int = 128
    limit: int | None = None
    texts: tuple[str, ...] = ()
    chat: bool = False
    full: bool = True
    recovery: bool = False
    inputs: Mapping[tuple[str, int], str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        checks.seed(self.seed)
        checks.whole("steps", self.steps, 1, checks.TOKENS)
        for name in ("documents", "limit"):
            if getattr(self, name) is not None:
                checks.whole(name, getattr(self, name), 1)
        for length in self.lengths:
            checks.whole("length", length, 1, checks.TOKENS)
        for word in (self.model, *self.texts, *(task.word for task in self.tasks)):
            if not can_be_written(word):  # a name of other bytes; rows could not hold it
                raise ConfigError(f"got name {word!r}, expected one that is UTF-8: rename it")

    def cells(self) -> list[Cell]:
        """Return all cells; the full cache comes first for each task and length, once and not once for each budget."""
        return list(self._cells())

    def _cells(self) -> Iterator[Cell]:
        given = [variant for variant in self.variants if variant.label != FULL]
        for task in self.tasks:
            replays = task.make().replays
            for length in self.lengths:
                if not replays and (self.full or len(given) < len(self.variants)):
                    yield Cell(task, length, parse_variant(FULL), 1.0)
                for variant in given:
                    for budget in self.budgets:
                        yield Cell(task, length, variant, budget)

    def wanted(self, task: TaskWord, length: int) -> Wanted:
        """Return what examples a task is to make."""
        made = task.make()
        named = self.texts if made.replays else tuple(text for text in self.texts if text not in KINDS)
        texts = task.files if made.reads_texts and task.files else named
        every = self.limit or 10**9 if made.needs_file else DOCUMENTS
        return Wanted(
            length=length,
            count=every if self.documents is None else self.documents,
            seed=self.seed,
            file=Path(task.files[0]) if made.needs_file and task.files else None,
            texts=texts,
            steps=self.steps,
            chat=self.chat,
        )

    def settings(self) -> dict[str, Any]:
        """Return what else decides about a row, as plain values: a row with other settings is another row."""
        usual = (
            dataclasses.asdict(CacheConfig()) | FIRST_DEFAULTS
        )  # fields that a later version adds change nothing here
        own = dataclasses.asdict(self.config)
        config = {name: plain(own[name]) for name in own if name != "budget" and own[name] != usual[name]}
        names = ("documents", "steps", "limit", "texts", "chat", "recovery")
        asked = {} if self.dtype == "auto" else {"dtype": self.dtype}
        asked |= {} if self.weights is None else {"weights": self.weights}
        return {name: plain(getattr(self, name)) for name in names} | asked | {"config": config}

    def key(self, cell: Cell) -> dict[str, Any]:
        """Return the part of a row that names its cell (`attnpred.evaluation.rows.KEY`); the inputs have to be known."""
        return {
            "model": self.model,
            "policy": cell.variant.label,
            "budget": cell.budget,
            "task": cell.task.word,
            "length": cell.length,
            "seed": self.seed,
            "settings": self.settings(),
            "inputs": self.inputs[cell.task.word, cell.length],
        }


def plain(value: Any) -> Any:
    """Return `value` as JSON would give it back."""
    if isinstance(value, Path):
        return str(value)
    return [plain(part) for part in value] if isinstance(value, tuple | list) else value


def parse_task(word: str) -> TaskWord:
    """Return the task that `word` names. Raises `ConfigError` for an unknown one, and for a file that is not there."""
    name, equals, rest = word.partition("=")
    if name not in TASKS:
        raise ConfigError(f"got task {name!r}, expected one of {', '.join(TASKS)}")
    task, files = TASKS[name](), tuple(rest.split("+")) if equals else ()
    if task.needs_file and len(files) != 1:
        raise ConfigError(f"got task {word!r}, expected its file: write {name}=FILE")
    if files and not (task.needs_file or task.reads_texts):
        raise ConfigError(f"got task {word!r}, expected no file: {name} makes its own documents")
    for file in files:
        is_elsewhere = task.replays or (task.needs_file and is_hub_name(file))  # recovery has names for some texts
        if not Path(file).is_file() and not is_elsewhere:
            raise ConfigError(f"got task {word!r}, expected a file that exists: there is no {file!r}")
    return TaskWord(word, name, files)


def parse_tasks(text: str) -> tuple[TaskWord, ...]:
    """Return the tasks of a list. Raises `ConfigError`."""
    found = tuple(parse_task(word) for word in re.split(r"[,\s]+", text.strip()) if word)
    if not found:
        raise ConfigError(f"got --tasks {text!r}, expected at least one of {', '.join(TASKS)}")
    return found


def as_budgets(numbers: Sequence[float]) -> tuple[int | float, ...]:
    """Return shares as they are, and numbers above 1 as whole tokens."""
    return tuple(int(number) if number > 1 and number.is_integer() else number for number in numbers)
