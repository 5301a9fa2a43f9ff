"""Planted facts (`attnpred.evaluation.facts`) in book text, asked for after it: apart, in turn, or as part of the prompt.

`facts1`, `facts4`: so many facts, each asked for by itself after the same document. `facts4_prompt`: the same documents
and questions, but each question is the end of the prompt, so an eviction knows it when it chooses (the published
setting of SnapKV and others). `facts_turns`: two of the four, one after the other in one cache; items are labelled with
their turn. What was kept for the first question must not make the second one look good.

An answer is right if its leading digits are the planted ones, all of them and no more.
"""

import random
import re
from dataclasses import dataclass, replace
from typing import Any, final

from attnpred.evaluation.facts import make_facts
from attnpred.evaluation.tasks.base import Example, Question, Task, Wanted
from attnpred.evaluation.tasks.haystack import Haystack
from attnpred.evaluation.tasks.planting import Asked, Hidden, in_prompt, longest, planted, question


@final
@dataclass(frozen=True, slots=True)
class Facts(Task):
    """Planted facts in book text, asked for after it: apart, in turn, or as the end of the prompt."""

    count: int = 4
    in_turn: bool = False
    in_prompt: bool = False

    def examples(self, tokenizer: Any, wanted: Wanted) -> list[Example]:
        haystack = Haystack.of(tokenizer, wanted)
        found = [self._example(tokenizer, haystack, wanted, i) for i in range(wanted.count)]
        return [part for one in found for part in in_prompt(one)] if self.in_prompt else found

    def _example(self, tokenizer: Any, haystack: Haystack, wanted: Wanted, i: int) -> Example:
        name = f"facts{self.count}"  # the same documents, however they are asked about
        rng = random.Random(f"{wanted.seed}/{name}/{wanted.length}/{i}")
        facts = make_facts(rng, self.count)
        hidden = [Hidden(fact.statement, rng.random()) for fact in facts]
        questions = [
            question(tokenizer, Asked(fact.question, (fact.answer.strip(),), {"depth": round(one.depth, 3)}))
            for fact, one in zip(facts, hidden, strict=True)
        ]
        tokens = planted(tokenizer, haystack, wanted, name, rng, hidden, after=longest(questions))
        if self.in_turn:
            turns = enumerate(questions[:2], 1)
            questions = [replace(one, labels=one.labels | {"turn": turn}) for turn, one in turns]
        return Example(str(i), tokens, tuple(questions), self.in_turn)

    def score(self, answer: str, question: Question) -> float:
        return leading_number(answer, question.answers)


def leading_number(answer: str, wanted: tuple[str, ...]) -> float:
    """Return 1 if the answer begins with one of the wanted numbers, after white space; else 0."""
    found = re.match(r"\s*(\d+)", answer)
    return float(found is not None and found[1] in wanted)
