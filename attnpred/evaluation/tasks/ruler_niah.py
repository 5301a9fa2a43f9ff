"""RULER's needles in a haystack (arXiv 2404.06654, appendix B): one file, eight settings.

               haystack   keys in it      value    asked for
single 1       noise      1               number   1
single 2       book       1               number   1
single 3       book       1               code     1
multikey 1     book       4               number   1
multikey 2     needles    all             number   1
multikey 3     needles    all (codes)     code     1
multivalue     book       1, 4 values     number   all 4 values
multiquery     book       4               number   all 4 keys
"""

import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, final

from attnpred.evaluation.tasks.base import Example, Question, Task, Wanted
from attnpred.evaluation.tasks.haystack import Haystack, encode, opening, room_for
from attnpred.evaluation.tasks.ruler_parts import NOISE, code, filled, number, share_found, spread, word_pairs

TYPES = {"number": number, "uuid": code}


@final
@dataclass(frozen=True, slots=True)
class Niah(Task):
    """RULER: special magic values hidden in a haystack; share of the asked ones that is found."""

    haystack: str = "book"
    keys: int = 1
    values: int = 1
    queries: int = 1
    key: str = "words"
    value: str = "number"

    def examples(self, tokenizer: Any, wanted: Wanted) -> list[Example]:
        book = Haystack.from_text(tokenizer, NOISE) if self.haystack == "noise" else Haystack.of(tokenizer, wanted)
        return [self._example(tokenizer, book, wanted, i) for i in range(wanted.count)]

    def _example(self, tokenizer: Any, book: Haystack, wanted: Wanted, i: int) -> Example:
        rng = random.Random(f"{wanted.seed}/{self}/{wanted.length}/{i}")
        make, taken = TYPES[self.value], self._keys(rng)
        needles = {next(taken): [make(rng) for _ in range(self.values)] for _ in range(self.keys)}
        chosen = rng.sample(list(needles), self.queries)
        answers = [value for key in chosen for value in needles[key]]
        before, after = self._wording(chosen)
        begin, tail = opening(tokenizer) + encode(tokenizer, before), encode(tokenizer, after)
        hidden = [encode(tokenizer, self._needle(key, value)) for key, own in needles.items() for value in own]
        rng.shuffle(hidden)
        room = room_for(wanted, "niah", len(begin), *map(len, hidden), len(tail))
        if self.haystack == "needles":
            others = (encode(tokenizer, self._needle(key, make(rng))) for key in taken)
            body = spread(rng, filled(others, room, "niah"), hidden)
        else:
            body = book.hide(book.cut(rng, room), hidden, [rng.random() for _ in hidden])
        size = sum(len(encode(tokenizer, f" {value},")) for value in answers) + 16
        labels = {"keys": self.keys, "values": self.values, "queries": self.queries}
        return Example(str(i), (*begin, *body), (Question(tuple(tail), tuple(answers), size, labels=labels),))

    def _keys(self, rng: random.Random) -> Iterator[str]:
        if self.key == "words":
            yield from word_pairs(rng)
        while True:
            yield code(rng)

    def _needle(self, key: str, value: str) -> str:
        return f" One of the special magic {self.value}s for {key} is: {value}."

    def _wording(self, chosen: list[str]) -> tuple[str, str]:
        """Return what comes before and after the haystack."""
        are, kind = ("are", f"{self.value}s") if self.values * self.queries > 1 else ("is", self.value)
        hidden = f"Some special magic {self.value}s are" if are == "are" else f"A special magic {self.value} is"
        query = chosen[0] if len(chosen) == 1 else f"{', '.join(chosen[:-1])}, and {chosen[-1]}"
        what = f"What are all the special magic {kind}" if are == "are" else f"What is the special magic {kind}"
        before = (
            f"{hidden} hidden within the following text. Make sure to memorize it. I will quiz you about the {kind} "
            "afterwards.\n"
        )
        after = (
            f"\n{what} for {query} mentioned in the provided text? The special magic {kind} for {query} mentioned in the "
            f"provided text {are}"
        )
        return before, after

    def score(self, answer: str, question: Question) -> float:
        return share_found(answer, question)
