"""Passkey retrieval: a number in text that says the same things over and over (Mohtashami and Jaggi, arXiv 2305.16300)."""

import random
from dataclasses import dataclass
from typing import Any, final

from attnpred.evaluation.tasks.base import Example, Question, Task, Wanted
from attnpred.evaluation.tasks.facts import leading_number
from attnpred.evaluation.tasks.haystack import Haystack, encode
from attnpred.evaluation.tasks.planting import Asked, Hidden, planted, question

NOISE = " The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
TASK = (
    "There is an important info hidden inside a lot of irrelevant text. Find it and memorize it. I will quiz you about the "
    "important information there.\n"
)
ASKED = "\nWhat is the pass key? The pass key is"


@final
@dataclass(frozen=True, slots=True)
class Passkey(Task):
    """A five-digit pass key in repeated sentences, at a grid of depths."""

    def examples(self, tokenizer: Any, wanted: Wanted) -> list[Example]:
        noise = Haystack.from_text(tokenizer, NOISE)
        found = []
        for i in range(wanted.count):
            rng = random.Random(f"{wanted.seed}/passkey/{wanted.length}/{i}")
            key, depth = str(rng.randrange(10000, 100000)), i / max(1, wanted.count - 1)
            hidden = Hidden(f" The pass key is {key}. Remember it. {key} is the pass key.", depth)
            asked = question(tokenizer, Asked(ASKED, (key,), {"depth": round(depth, 3)}))
            after = len(encode(tokenizer, ASKED))
            tokens = planted(tokenizer, noise, wanted, "passkey", rng, [hidden], TASK, after)
            found.append(Example(str(i), tokens, (asked,)))
        return found

    def score(self, answer: str, question: Question) -> float:
        return leading_number(answer, question.answers)
