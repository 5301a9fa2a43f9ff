"""Needles in book text, over a grid of depths: the picture of depth against length that papers show.

`needle`: one needle at depth i/(n-1) in document i of n; each document is asked once. `needle4`: four needles spread over
the document, each asked for apart. `needle_values`: one key that is given three times, with three numbers, all of which
are asked for at once; the score is the share that was found. A needle is a planted fact, so a model needs no chat format.
"""

import random
import re
from dataclasses import dataclass
from typing import Any, final

from attnpred.evaluation.facts import make_facts
from attnpred.evaluation.tasks.base import Example, Question, Task, Wanted
from attnpred.evaluation.tasks.haystack import Haystack
from attnpred.evaluation.tasks.planting import Asked, Hidden, longest, planted, question


@final
@dataclass(frozen=True, slots=True)
class Needle(Task):
    """Needles at a grid of depths in book text: one, several, or several values of one key."""

    needles: int = 1
    values: int = 1

    def examples(self, tokenizer: Any, wanted: Wanted) -> list[Example]:
        haystack = Haystack.of(tokenizer, wanted)
        return [self._example(tokenizer, haystack, wanted, i) for i in range(wanted.count)]

    def _example(self, tokenizer: Any, haystack: Haystack, wanted: Wanted, i: int) -> Example:
        name = f"needle{self.needles}x{self.values}"
        rng = random.Random(f"{wanted.seed}/{name}/{wanted.length}/{i}")
        first = i / max(1, wanted.count - 1)
        hidden: list[Hidden] = []
        asked: list[Asked] = []
        for j, fact in enumerate(make_facts(rng, self.needles)):
            numbers = rng.sample(range(1000, 10000), self.values)
            depths = [
                (first + (j * self.values + k) / (self.needles * self.values)) % 1.0001 for k in range(self.values)
            ]
            start = fact.statement.removesuffix(f"{fact.answer}.")
            hidden += [Hidden(f"{start} {number}.", depth) for number, depth in zip(numbers, depths, strict=True)]
            labels = {"depth": round(depths[0], 3)} if self.values == 1 else {"depths": [round(x, 3) for x in depths]}
            asked.append(Asked(fact.question, tuple(map(str, numbers)), labels))
        questions = tuple(question(tokenizer, one) for one in asked)
        tokens = planted(tokenizer, haystack, wanted, "needle", rng, hidden, after=longest(questions))
        return Example(str(i), tokens, questions)

    def score(self, answer: str, question: Question) -> float:
        """Return the share of the numbers that the answer has."""
        found = re.findall(r"\d+", answer)
        return sum(number in found for number in question.answers) / len(question.answers)
