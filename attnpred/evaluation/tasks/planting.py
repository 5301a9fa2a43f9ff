"""A document with things hidden in it, and questions after it: what the retrieval tasks have in common."""

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from attnpred.evaluation.tasks.base import Example, Question, Wanted
from attnpred.evaluation.tasks.haystack import Haystack, encode, opening, room_for

SLACK = 1
"""Tokens that an answer may take beyond its own, so that it is seen where a number ends."""


@dataclass(frozen=True, slots=True)
class Hidden:
    """A sentence and where it goes, 0 the beginning and 1 the end."""

    text: str
    depth: float


@dataclass(frozen=True, slots=True)
class Asked:
    """text: what follows the document; answers: as in `Question`; tokens of all answers, and `SLACK`, are generated."""

    text: str
    answers: tuple[str, ...]
    labels: dict[str, Any] = field(default_factory=dict)


def planted(
    tokenizer: Any,
    haystack: Haystack,
    wanted: Wanted,
    task: str,
    rng: random.Random,
    hidden: Sequence[Hidden],
    before: str = "",
    after: int = 0,
) -> tuple[int, ...]:
    """Return a document: `before`, then `haystack` with all that is `hidden`; `after` tokens are left for a question.

    Raises `ConfigError` if `wanted.length` is too short.
    """
    begin = opening(tokenizer) + encode(tokenizer, before)
    pieces = [encode(tokenizer, one.text) for one in hidden]
    room = room_for(wanted, task, len(begin), *map(len, pieces), after)
    body = haystack.hide(haystack.cut(rng, room), pieces, [one.depth for one in hidden])
    return (*begin, *body)


def question(tokenizer: Any, asked: Asked) -> Question:
    """Return the question as tokens."""
    size = sum(len(encode(tokenizer, f" {answer}")) for answer in asked.answers) + SLACK
    return Question(tuple(encode(tokenizer, asked.text)), asked.answers, size, labels=asked.labels)


def longest(questions: Sequence[Question]) -> int:
    """Return the tokens of the longest question."""
    return max(len(one.tokens) for one in questions)


def in_prompt(example: Example) -> list[Example]:
    """Return an example for each question, which then is the end of the document."""
    return [
        Example(
            f"{example.name}.{i}",
            (*example.tokens, *one.tokens),
            (Question((), one.answers, one.new_tokens, one.stop, one.labels),),
        )
        for i, one in enumerate(example.questions)
    ]
