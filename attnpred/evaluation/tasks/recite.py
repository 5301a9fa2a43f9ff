"""One long answer: the model is asked for one planted fact and then writes on by itself.

A model that has seen questions and answers goes on with more of them; every sentence "... of KEY is NUMBER" that it writes
about a planted key is held against the text. All of it is its own output, so what a policy loses shows in what is
repeated, made up or left out. An item is a document; its value is the share of the planted facts that were stated, the
first time, with the right number.
"""

import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, final

from attnpred.evaluation.facts import make_facts
from attnpred.evaluation.tasks.base import Example, Item, Question, Session, Task, Wanted
from attnpred.evaluation.tasks.haystack import Haystack, encode
from attnpred.evaluation.tasks.planting import Hidden, planted

STATED = re.compile(r" of ((?:the )?[A-Za-z]+(?: [a-z]+)?) is\s+(\d+)")


@final
@dataclass(frozen=True, slots=True)
class Recite(Task):
    """Planted facts told in one long answer of the model's own."""

    metric: ClassVar[str] = "share_stated"
    count: int = 4
    new_tokens: int = 160

    def examples(self, tokenizer: Any, wanted: Wanted) -> list[Example]:
        haystack = Haystack.of(tokenizer, wanted)
        return [self._example(tokenizer, haystack, wanted, i) for i in range(wanted.count)]

    def _example(self, tokenizer: Any, haystack: Haystack, wanted: Wanted, i: int) -> Example:
        rng = random.Random(f"{wanted.seed}/recite/{wanted.length}/{i}")
        facts = make_facts(rng, self.count)
        hidden = [Hidden(fact.statement, rng.random()) for fact in facts]
        ids = encode(tokenizer, facts[0].question)
        tokens = planted(tokenizer, haystack, wanted, "recite", rng, hidden, after=len(ids))
        told = {fact.key: fact.answer.strip() for fact in facts}
        labels = {"start": facts[0].question, "told": told}
        return Example(str(i), tokens, (Question(tuple(ids), tuple(told.values()), self.new_tokens, labels=labels),))

    def score(self, answer: str, question: Question) -> float:
        return statements(answer, question)["right"] / len(question.labels["told"])

    def run(self, session: Session, example: Example) -> Iterator[Item]:
        """Ask once, let it write."""
        [question] = example.questions
        answer = session.ask(session.read(example.tokens), question)
        yield Item(example.name, self.score(answer, question), statements(answer, question), answer)


def statements(answer: str, question: Question) -> dict[str, int]:
    """Return how many planted keys were told a number, how many of these rightly, and how many statements there were."""
    first: dict[str, str] = {}
    found = STATED.findall(question.labels["start"] + answer)
    for key, number in found:
        first.setdefault(key, number)
    told = question.labels["told"]
    return {
        "right": sum(first.get(key) == number for key, number in told.items()),
        "known": sum(key in told for key in first),
        "statements": len(found),
    }
