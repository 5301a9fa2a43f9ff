"""Multi-hop questions: planted facts that chain, because the number of one is the key of the next.

"The code of Clara is 4821." somewhere, "The code of 4821 is 7730." somewhere else. Every document is asked about its
chain after 1, 2 and 3 hops, apart; only the first and the last link are named in the question, so everything in between
has to be found. Other chains of the same length stand in the text, so the last number cannot be guessed from its form.
"""

import itertools
import random
from dataclasses import dataclass
from typing import Any, final

from attnpred.evaluation.facts import NAMES
from attnpred.evaluation.tasks.base import Example, Question, Task, Wanted
from attnpred.evaluation.tasks.facts import leading_number
from attnpred.evaluation.tasks.haystack import Haystack
from attnpred.evaluation.tasks.planting import Asked, Hidden, longest, planted, question


@final
@dataclass(frozen=True, slots=True)
class Hops(Task):
    """Planted facts that lead to each other, asked for after one, two and three hops."""

    hops: int = 3
    chains: int = 2

    def examples(self, tokenizer: Any, wanted: Wanted) -> list[Example]:
        haystack = Haystack.of(tokenizer, wanted)
        return [self._example(tokenizer, haystack, wanted, i) for i in range(wanted.count)]

    def _example(self, tokenizer: Any, haystack: Haystack, wanted: Wanted, i: int) -> Example:
        rng = random.Random(f"{wanted.seed}/hops/{wanted.length}/{i}")
        numbers = iter(rng.sample(range(1000, 10000), self.hops * self.chains))
        chains = [[name, *(str(next(numbers)) for _ in range(self.hops))] for name in rng.sample(NAMES, self.chains)]
        hidden = [
            Hidden(f" The code of {key} is {value}.", rng.random())
            for chain in chains
            for key, value in itertools.pairwise(chain)
        ]
        questions = []
        for count in range(1, self.hops + 1):
            what = "the code of " * count + chains[0][0]
            text = f" What is {what}? T{what[1:]} is"
            questions.append(question(tokenizer, Asked(text, (chains[0][count],), {"hops": count})))
        tokens = planted(tokenizer, haystack, wanted, "hops", rng, hidden, after=longest(questions))
        return Example(str(i), tokens, tuple(questions))

    def score(self, answer: str, question: Question) -> float:
        return leading_number(answer, question.answers)
