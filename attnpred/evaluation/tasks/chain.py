"""Pointer chasing in one cache: a long output in which errors build up, since every step depends on the last answer.

A document holds six records; the last digit of each number names the record that comes next. The model is asked for one
record, writes its number, is asked for the record that the number it wrote names, and so on, in one conversation. Which
record that is, is read off the model's answer and not off the right one: a wrong digit leads astray (modulo six), and what
follows is wrong unless it comes back by chance. An item is a step; it is right if it is the number that the true chain
has there. The true chain visits every record once.

A model that finds single facts can do this, whatever its size; the question only names the key. (Chains that a model
follows in its head are `hops`.)
"""

import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, final

from attnpred.evaluation.facts import Fact, make_facts
from attnpred.evaluation.tasks.base import Example, Item, Question, Session, Task, Wanted
from attnpred.evaluation.tasks.facts import leading_number
from attnpred.evaluation.tasks.haystack import Haystack
from attnpred.evaluation.tasks.planting import Asked, Hidden, longest, planted, question

RECORDS = 6
"""As many as there are kinds of facts."""


@final
@dataclass(frozen=True, slots=True)
class Chain(Task):
    """Six records that point to each other, followed step by step in one cache; errors build up."""

    steps: int = 6

    def examples(self, tokenizer: Any, wanted: Wanted) -> list[Example]:
        haystack = Haystack.of(tokenizer, wanted)
        return [self._example(tokenizer, haystack, wanted, i) for i in range(wanted.count)]

    def _example(self, tokenizer: Any, haystack: Haystack, wanted: Wanted, i: int) -> Example:
        rng = random.Random(f"{wanted.seed}/chain/{wanted.length}/{i}")
        facts = _records(rng)
        order = rng.sample(range(RECORDS), RECORDS)  # one circle through all records
        follows = dict(zip(order, order[1:] + order[:1], strict=True))
        numbers = [f"{rng.randrange(100, 1000)}{follows[j]}" for j in range(RECORDS)]
        hidden = [Hidden(_stated(fact, number), rng.random()) for fact, number in zip(facts, numbers, strict=True)]
        questions = tuple(
            question(tokenizer, Asked(fact.question, (number,), {"record": j}))
            for j, (fact, number) in enumerate(zip(facts, numbers, strict=True))
        )
        tokens = planted(tokenizer, haystack, wanted, "chain", rng, hidden, after=longest(questions))
        return Example(str(i), tokens, questions, in_turn=True, labels={"first": order[0]})

    def score(self, answer: str, question: Question) -> float:
        return leading_number(answer, question.answers)

    def run(self, session: Session, example: Example) -> Iterator[Item]:
        """Follow the model's answers; compare with the true chain."""
        cache = session.read(example.tokens)
        asked = true = example.labels["first"]
        for step in range(1, self.steps + 1):
            answer = session.ask(cache, example.questions[asked])
            labels = {"step": step, "record": true, "asked": asked}
            yield Item(f"{example.name}/{step}", self.score(answer, example.questions[true]), labels, answer)
            true = int(example.questions[true].answers[0][-1])
            found = re.match(r"\s*(\d+)", answer)
            asked = int(found[1][-1]) % len(example.questions) if found else asked


def _records(rng: random.Random) -> list[Fact]:
    """Return facts about people, each of another kind (code, lucky number ...): as different as they can be."""
    found: dict[str, Fact] = {}
    while len(found) < RECORDS:
        [fact] = make_facts(rng, 1)
        if not fact.key.startswith("the ") and fact.key not in [other.key for other in found.values()]:
            found.setdefault(fact.question.partition(f" of {fact.key}?")[0], fact)
    return list(found.values())


def _stated(fact: Fact, number: str) -> str:
    return fact.statement.removesuffix(f"{fact.answer}.") + f" {number}."
