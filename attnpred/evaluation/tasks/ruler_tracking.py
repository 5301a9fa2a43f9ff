"""RULER's variable tracking (arXiv 2404.06654, appendix B): chains of assignments in noise; which variables have the value?

`VAR AXQTB = 12345`, then `VAR KLMNO = VAR AXQTB` and so on, in order, at random places. Further chains have other values.
"""

import random
import string
from dataclasses import dataclass
from typing import Any, final

from attnpred.evaluation.tasks.base import Example, Question, Task, Wanted
from attnpred.evaluation.tasks.haystack import Haystack, encode, opening, room_for
from attnpred.evaluation.tasks.ruler_parts import NOISE, share_found

BEFORE = "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n"


@final
@dataclass(frozen=True, slots=True)
class VariableTracking(Task):
    """RULER: variables that get one value through a chain of assignments; share of them that is named."""

    chains: int = 1
    hops: int = 4

    def examples(self, tokenizer: Any, wanted: Wanted) -> list[Example]:
        noise = Haystack.from_text(tokenizer, NOISE)
        return [self._example(tokenizer, noise, wanted, i) for i in range(wanted.count)]

    def _example(self, tokenizer: Any, noise: Haystack, wanted: Wanted, i: int) -> Example:
        rng = random.Random(f"{wanted.seed}/{self}/{wanted.length}/{i}")
        names: set[str] = set()
        while len(names) < self.chains * (self.hops + 1):
            names.add("".join(rng.choice(string.ascii_uppercase) for _ in range(5)))
        free = sorted(names)
        rng.shuffle(free)
        values = rng.sample(range(10000, 100000), self.chains)
        pieces: list[list[int]] = []
        depths: list[float] = []
        chains = [free[j :: self.chains] for j in range(self.chains)]
        for value, chain in zip(values, chains, strict=True):
            given = [str(value), *(f"VAR {name}" for name in chain)]
            statements = [f" VAR {name} = {source}." for name, source in zip(chain, given, strict=False)]
            pieces += [encode(tokenizer, statement) for statement in statements]
            depths += [0.05 + 0.9 * (j + rng.random()) / len(chain) for j in range(len(chain))]
        after = (
            f"\nQuestion: Find all variables that are assigned the value {values[0]} in the text above. Answer: According to "
            f"the chain(s) of variable assignment in the text above, {self.hops + 1} variables are assigned the value "
            f"{values[0]}, they are:"
        )
        begin, tail = opening(tokenizer) + encode(tokenizer, BEFORE), encode(tokenizer, after)
        room = room_for(wanted, "vt", len(begin), *map(len, pieces), len(tail))
        body = noise.hide(noise.cut(rng, room), pieces, depths)
        size = sum(len(encode(tokenizer, f" {name},")) for name in chains[0]) + 8
        question = Question(tuple(tail), tuple(chains[0]), size, labels={"hops": self.hops, "chains": self.chains})
        return Example(str(i), (*begin, *body), (question,))

    def score(self, answer: str, question: Question) -> float:
        return share_found(answer, question)
