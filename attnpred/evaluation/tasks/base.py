"""What a task is: documents, questions about them, and a score between 0 and 1 (or another metric) for what was answered.

A document is read once. Its questions are asked `apart`, each to a copy of the cache as it was after the document, or `in
turn`, one after the other on the same cache, as in a conversation: an eviction that fits the first question shows in the
second. A question that belongs to the prompt (the published setting of several methods) is part of the document's tokens,
and the question itself is empty.

Everything is token ids, so that lengths are exact. A task that measures other things than answers overrides `run`; one
that needs to know what the full cache says overrides `prepare`; one whose cell is more than one row overrides `measure`.
Every item has a name that is the same for every policy, by which rows are compared in pairs.
"""

import itertools
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Protocol

from torch import Tensor

from attnpred.config import CacheConfig
from attnpred.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Question:
    """tokens: ids that follow the document; answers: any of them is right; new_tokens: how many are generated.

    stop: text at which an answer ends, "" for none. labels: what a report may sort by (depth, hops ...), plain values.
    """

    tokens: tuple[int, ...]
    answers: tuple[str, ...]
    new_tokens: int
    stop: str = ""
    labels: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Example:
    """tokens: ids of the document; in_turn: the questions share one cache and see each other.

    labels: of the whole document, for tasks that override `run`. reference: what `Task.prepare` found out.
    """

    name: str
    tokens: tuple[int, ...]
    questions: tuple[Question, ...]
    in_turn: bool = False
    labels: dict[str, Any] = field(default_factory=dict)
    reference: Any = None


@dataclass(frozen=True, slots=True)
class Item:
    """One measured thing: `value` counts in the row's mean; labels as in `Question`; text: what was answered."""

    name: str
    value: float
    labels: dict[str, Any] = field(default_factory=dict)
    text: str = ""


@dataclass(frozen=True, slots=True)
class Measured:
    """What becomes one row: its items, and figures that the row has beside (or instead of) the usual ones."""

    items: list[Item]
    figures: dict[str, Any] = field(default_factory=dict)


class Session(Protocol):
    """A model with one policy and budget, which counts what its caches read (`attnpred.evaluation.session`)."""

    tokenizer: Any
    model: Any
    policy: Any
    settings: CacheConfig

    def read(self, tokens: Sequence[int]) -> Any:
        """Return a cache that holds the document."""

    def fork(self, cache: Any) -> Any:
        """Return a copy of a cache: asking it does not change the first."""

    def ask(self, cache: Any, question: Question) -> str:
        """Return the greedy continuation after the question, which with it stays in the cache."""

    def generate(self, cache: Any, question: Question) -> list[int]:
        """As `ask`, but return the ids."""

    def follow(self, cache: Any, tokens: Sequence[int]) -> Tensor:
        """Feed given tokens one by one; return the log-probabilities after each, fp32 [T, vocabulary]."""


@dataclass(frozen=True, slots=True)
class Wanted:
    """What examples to make: `length` tokens of document and question, `count` documents, from `seed`, or from `file`.

    texts: files of text to hide things in or to continue; none is the embedded book. steps: decode steps of tasks that
    continue a text. chat: put prompts of a file into the tokenizer's chat template.
    """

    length: int
    count: int
    seed: int = 0
    file: Path | None = None
    texts: tuple[str, ...] = ()
    steps: int = 128
    chat: bool = False


class Task(ABC):
    """Interface; concrete tasks are final dataclasses of their settings, and lines of `TASKS`."""

    metric: ClassVar[str] = "accuracy"
    """What `value` is; higher is better unless `lower_is_better`."""
    lower_is_better: ClassVar[bool] = False
    needs_file: ClassVar[bool] = False
    """Its examples come from a file in a published format."""
    reads_texts: ClassVar[bool] = False
    """`NAME=FILE+FILE` gives it texts instead of the embedded book."""
    replays: ClassVar[bool] = False
    """Selections are measured by replay: no row needs the full cache beside it, and the dense path is off."""

    @abstractmethod
    def examples(self, tokenizer: Any, wanted: Wanted) -> list[Example]:
        """Return the examples; the same for the same arguments. Raises `ConfigError` with the place in a file."""

    @abstractmethod
    def score(self, answer: str, question: Question) -> float:
        """Return how good an answer is."""

    def prepare(self, session: Session, example: Example) -> Example:
        """Return the example with its `reference`; called once for all policies, with the full cache."""
        return example

    def measure(self, session: Session, examples: Sequence[Example], limit: int | None) -> list[Measured]:
        """Return what the rows of one policy and budget are made of: one row of at most `limit` items."""
        items = itertools.chain.from_iterable(self.run(session, example) for example in examples)
        return [Measured(list(itertools.islice(items, limit)))]

    def run(self, session: Session, example: Example) -> Iterator[Item]:
        """Read the document, ask its questions, score the answers."""
        cache = session.read(example.tokens)
        for i, question in enumerate(example.questions):
            answer = session.ask(cache if example.in_turn else session.fork(cache), question)
            if question.stop:
                answer = answer.partition(question.stop)[0]
            yield Item(f"{example.name}/{i}", self.score(answer, question), question.labels, answer)


def require_file(wanted: Wanted, task: str) -> Path:
    """Return the file of a task that reads one. Raises `ConfigError`."""
    if wanted.file is None or not wanted.file.is_file():
        raise ConfigError(f"got task {task!r} with file {wanted.file}, expected a file that exists: give {task}=FILE")
    return wanted.file
