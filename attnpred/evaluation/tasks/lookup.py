"""Multi-turn key-value lookup on one cache (after SCBench's key-value retrieval, arXiv 2412.10319).

A document of records is read once; then one record after another is asked for, in one conversation. What an eviction
kept for the first question must serve the later ones too: items are labelled with their turn.
"""

import random
from dataclasses import dataclass
from typing import Any, final

from attnpred.evaluation.facts import make_facts
from attnpred.evaluation.tasks.base import Example, Question, Task, Wanted
from attnpred.evaluation.tasks.facts import leading_number
from attnpred.evaluation.tasks.haystack import Haystack
from attnpred.evaluation.tasks.planting import Asked, Hidden, longest, planted, question


@final
@dataclass(frozen=True, slots=True)
class Lookup(Task):
    """Records hidden in book text, looked up one after the other in one cache; labelled by turn."""

    records: int = 8
    turns: int = 5

    def examples(self, tokenizer: Any, wanted: Wanted) -> list[Example]:
        haystack = Haystack.of(tokenizer, wanted)
        return [self._example(tokenizer, haystack, wanted, i) for i in range(wanted.count)]

    def _example(self, tokenizer: Any, haystack: Haystack, wanted: Wanted, i: int) -> Example:
        rng = random.Random(f"{wanted.seed}/lookup{self.records}/{wanted.length}/{i}")
        facts = make_facts(rng, self.records)
        hidden = [Hidden(fact.statement, rng.random()) for fact in facts]
        chosen = rng.sample(range(self.records), self.turns)
        questions = [
            question(
                tokenizer,
                Asked(
                    facts[j].question,
                    (facts[j].answer.strip(),),
                    {"turn": turn, "depth": round(hidden[j].depth, 3)},
                ),
            )
            for turn, j in enumerate(chosen, 1)
        ]
        tokens = planted(tokenizer, haystack, wanted, "lookup", rng, hidden, after=longest(questions))
        return Example(str(i), tokens, tuple(questions), in_turn=True)

    def score(self, answer: str, question: Question) -> float:
        return leading_number(answer, question.answers)
