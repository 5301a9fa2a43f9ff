"""RULER's aggregation tasks (arXiv 2404.06654, appendix B): the most common words of a list, and of a coded text.

Common words: ten words come 30 times, all others three times, in random order, numbered. Frequent words: coded words drawn
by a zeta distribution with alpha = 2; the three most frequent are asked for. Where the length leaves less room, common
words come less often, and never less than twice as often as the others.
"""

import random
import re
import string
from collections import Counter
from dataclasses import dataclass
from typing import Any, final

from attnpred.errors import ConfigError
from attnpred.evaluation.book import demo_book
from attnpred.evaluation.tasks.base import Example, Question, Task, Wanted
from attnpred.evaluation.tasks.haystack import encode, opening, room_for
from attnpred.evaluation.tasks.ruler_parts import share_found

COMMON_BEFORE = (
    "Below is a numbered list of words. In these words, some appear more often than others. Memorize the ones that appear "
    "most often.\n"
)
COMMON_AFTER = (
    "\nQuestion: What are the 10 most common words in the above list? Answer: The top 10 words that appear most often in the "
    "list are:"
)
FREQUENT_BEFORE = (
    "Read the following coded text and track the frequency of each coded word. Find the three most frequently appeared coded "
    "words. "
)
FREQUENT_AFTER = (
    "\nQuestion: Do not provide any explanation. Please ignore the dots '....'. What are the three most frequently appeared "
    "words in the above coded text? Answer: According to the coded text above, the three most frequently appeared words are:"
)
COMMON, OFTEN, SELDOM = 10, 30, 3
VOCABULARY, ALPHA, FREQUENT = 50, 2.0, 3


@final
@dataclass(frozen=True, slots=True)
class CommonWords(Task):
    """RULER: the ten most common words of a numbered list; share of them that is named."""

    def examples(self, tokenizer: Any, wanted: Wanted) -> list[Example]:
        words = sorted(set(re.findall(r"\b[a-z]{4,9}\b", demo_book())))
        return [self._example(tokenizer, words, wanted, i) for i in range(wanted.count)]

    def _example(self, tokenizer: Any, words: list[str], wanted: Wanted, i: int) -> Example:
        rng = random.Random(f"{wanted.seed}/cwe/{wanted.length}/{i}")
        order = rng.sample(words, len(words))
        begin, tail = opening(tokenizer) + encode(tokenizer, COMMON_BEFORE), encode(tokenizer, COMMON_AFTER)
        room = room_for(wanted, "cwe", len(begin), len(tail))
        ids = {word: encode(tokenizer, f" {word}") for word in order[: room // SELDOM + COMMON]}
        for often in (OFTEN, 20, 12, 8, 6):
            count = _fitting(tokenizer, [len(ids[word]) for word in ids], often, room)
            if count > COMMON:
                break
        else:
            raise ConfigError(
                f"got length {wanted.length} for task 'cwe', expected more: ten words six times do not fit"
            )
        listed = order[:COMMON] * often + order[COMMON:count] * _seldom(often)
        rng.shuffle(listed)
        body = [token for j, word in enumerate(listed, 1) for token in (*encode(tokenizer, f" {j}."), *ids[word])]
        # what is left over is white space: no word is cut
        body = (encode(tokenizer, "\n") * room)[: room - len(body)] + body
        size = sum(len(encode(tokenizer, f" {word},")) for word in order[:COMMON]) + 30
        question = Question(tuple(tail), tuple(order[:COMMON]), size, labels={"often": often})
        return Example(str(i), (*begin, *body), (question,))

    def score(self, answer: str, question: Question) -> float:
        return share_found(answer, question)


@final
@dataclass(frozen=True, slots=True)
class FrequentWords(Task):
    """RULER: the three most frequent words of a coded text; share of them that is named."""

    def examples(self, tokenizer: Any, wanted: Wanted) -> list[Example]:
        return [self._example(tokenizer, wanted, i) for i in range(wanted.count)]

    def _example(self, tokenizer: Any, wanted: Wanted, i: int) -> Example:
        rng = random.Random(f"{wanted.seed}/fwe/{wanted.length}/{i}")
        coded: list[str] = []
        while len(coded) < VOCABULARY:
            word = "".join(rng.choice(string.ascii_lowercase) for _ in range(6))
            coded += [] if word in coded else [word]
        begin, tail = opening(tokenizer) + encode(tokenizer, FREQUENT_BEFORE), encode(tokenizer, FREQUENT_AFTER)
        room = room_for(wanted, "fwe", len(begin), len(tail))
        pieces = {word: encode(tokenizer, f" {word}") for word in coded}
        drawn, answers = _drawn(rng, coded, {word: len(ids) for word, ids in pieces.items()}, room)
        size = sum(len(pieces[word]) for word in drawn)
        dots = (encode(tokenizer, " ....") * room)[: room - size]
        body = dots + [token for word in drawn for token in pieces[word]]
        new = sum(len(encode(tokenizer, f" {word},")) for word in answers) + 10
        question = Question(tuple(tail), answers, new, labels={"words": len(drawn)})
        return Example(str(i), (*begin, *body), (question,))

    def score(self, answer: str, question: Question) -> float:
        return share_found(answer, question)


def _seldom(often: int) -> int:
    return min(SELDOM, often // 2)


def _fitting(tokenizer: Any, sizes: list[int], often: int, room: int) -> int:
    """Return how many different words fit: of the first ten `often` copies, of the others few; each with its number."""
    used = listed = 0
    for count, size in enumerate(sizes):
        copies = often if count < COMMON else _seldom(often)
        used += copies * size + sum(len(encode(tokenizer, f" {listed + j}.")) for j in range(1, copies + 1))
        listed += copies
        if used > room:
            return count
    return len(sizes)


def _drawn(rng: random.Random, coded: list[str], sizes: dict[str, int], room: int) -> tuple[list[str], tuple[str, ...]]:
    """Return as many words as `room` tokens hold, and the most frequent; drawn again where that is not clear."""
    weights = [1 / (rank + 1) ** ALPHA for rank in range(VOCABULARY)]
    for _ in range(100):
        drawn: list[str] = []
        left = room
        while (left := left - sizes[word := rng.choices(coded, weights)[0]]) >= 0:
            drawn.append(word)
        counts = [*Counter(drawn).most_common(FREQUENT + 1), ("", 0), ("", 0), ("", 0), ("", 0)]
        if counts[FREQUENT - 1][1] > counts[FREQUENT][1]:
            return drawn, tuple(word for word, _ in counts[:FREQUENT])
    raise ConfigError(f"got {room} tokens for the words of task 'fwe', expected more: give a greater length")
