"""What the demo LM is trained on: book text, and sequences in which something must be looked up.

Each sampler returns one sequence as (token ids, loss weights), one longer than the context, because the target is the
next token; the weight stands with the target. Kinds:

* `book`: plain text.
* `dense`: 2 to 16 facts restated over and over in random order; nearly every digit can be looked up.
* `restated`: facts stated in book text and stated again 8 to `gap` tokens later.
* `planted`: one to six facts hidden in book text, questions about them at the end.
* `repeat`: a passage of the text comes again, word for word.

`positions` stretches a short sequence over a long range: at one to three places the position jumps ahead, so that
distances of the full context are seen at the price of a short one.
"""

import random
from collections.abc import Callable

import numpy as np
from tokenizers import Tokenizer

from attnpred.evaluation.facts import Fact, make_facts

FILL, ANSWER, COPY = 1.0, 5.0, 2.0
Sample = tuple[list[int], list[float]]


class Sampler:
    """Draws training sequences; all randomness comes from `rng`."""

    def __init__(self, tokens: np.ndarray, tokenizer: Tokenizer, rng: random.Random) -> None:
        self.tokens, self.rng = tokens, rng
        self._encode_ids: Callable[[str], list[int]] = lambda text: tokenizer.encode(text).ids
        self.stops = {i for i in range(tokenizer.get_vocab_size()) if tokenizer.id_to_token(i)[-1:] in (".", "!", "?")}

    def draw(self, kind: str, length: int, gap: int) -> Sample:
        """Return a sequence of `length` + 1 tokens of one kind; `gap` bounds the distance between restatements."""
        ids, weights = getattr(self, kind)(length + 1, gap)
        return ids[: length + 1], weights[: length + 1]

    def text(self, length: int) -> list[int]:
        start = self.rng.randrange(len(self.tokens) - length)
        return self.tokens[start : start + length].tolist()

    def fact(self, fact: Fact, known: bool, asked: bool = False) -> Sample:
        """Encode a fact; its digits carry weight only if the text before tells them (`known`)."""
        before = self._encode_ids(fact.question if asked else fact.statement[: -len(fact.answer) - 1])
        digits, stop = self._encode_ids(fact.answer), self._encode_ids(".")
        weight = ANSWER if known else 0.0
        return before + digits + stop, [FILL] * len(before) + [weight] * len(digits) + [FILL] * len(stop)

    def book(self, length: int, gap: int) -> Sample:
        return self.text(length), [FILL] * length

    def dense(self, length: int, gap: int) -> Sample:
        facts = make_facts(self.rng, self.rng.choice((2, 2, 3, 4, 6, 8, 16)))
        ids: list[int] = []
        weights: list[float] = []
        known: set[str] = set()
        while len(ids) < length:
            fact = self.rng.choice(facts)
            piece, weight = self.fact(fact, fact.key in known, asked=fact.key in known and self.rng.random() < 0.3)
            known.add(fact.key)
            ids += piece
            weights += [w if w == ANSWER else 0.2 * w for w in weight]
        return ids, weights

    def restated(self, length: int, gap: int) -> Sample:
        facts = iter(make_facts(self.rng, 1 + length // 24))
        due: list[tuple[int, Fact]] = []
        ids: list[int] = []
        weights: list[float] = []
        while len(ids) < length:
            now = [pair for pair in due if pair[0] <= len(ids)]
            if now:
                due.remove(now[0])
                fact, known = now[0][1], True
            else:
                fact, known = next(facts), False
            again = int(8 * (gap / 8) ** self.rng.random())
            piece, weight = self.fact(fact, known, asked=known and self.rng.random() < 0.4)
            ids, weights = ids + piece, weights + weight
            if not known or self.rng.random() < 0.5:
                due.append((len(ids) + again, fact))
            fill = self.text(self.rng.randrange(4, 40 if gap <= 256 else 120))
            ids, weights = ids + fill, weights + [0.5 * FILL] * len(fill)
        return ids, weights

    def planted(self, length: int, gap: int) -> Sample:
        facts = make_facts(self.rng, self.rng.choice((1, 1, 2, 4, 4, 6)))
        questions = [self.fact(fact, True, asked=True) for fact in self.rng.sample(facts, len(facts))]
        statements = [self.fact(fact, False) for fact in facts]
        room = length - sum(len(ids) for ids, _ in questions + statements)
        body = self.text(room)
        ends = [i + 1 for i, token in enumerate(body) if token in self.stops] or [room // 2]
        places = sorted((self.rng.choice(ends) for _ in facts), reverse=True)
        ids, weights = list(body), [0.5 * FILL] * room
        for place, (piece, weight) in zip(places, statements, strict=True):
            ids[place:place], weights[place:place] = piece, weight
        for piece, weight in questions:
            ids, weights = ids + piece, weights + weight
        return ids, weights

    def repeat(self, length: int, gap: int) -> Sample:
        size = self.rng.randrange(16, max(17, min(256, length // 3)))
        first = self.rng.randrange(0, length - 2 * size)
        again = self.rng.randrange(first + size, length - size)
        ids, weights = self.text(length), [FILL] * length
        ids[again : again + size] = ids[first : first + size]
        weights[again + 2 : again + size] = [COPY] * (size - 2)
        return ids, weights

    def positions(self, length: int, limit: int) -> np.ndarray:
        """Return `length` increasing positions below `limit`: half of the time with jumps, else 0, 1, 2, ..."""
        steps = np.ones(length, dtype=np.int64)
        steps[0] = 0
        if limit > length and self.rng.random() < 0.5:
            slack = int((limit - length) * self.rng.random() ** 2)
            for share in (0.5, 0.3, 0.2):
                steps[self.rng.randrange(1, length)] += int(slack * share)
        return np.cumsum(steps)
