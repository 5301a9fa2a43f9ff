"""Bits per byte of a long book by position: decode steps with teacher-forced tokens after a dense prefix.

A document is `length` tokens of text, read in one call, and `steps` tokens more, fed one by one, so every step lives on
what the policy's own earlier steps have left. Bits per byte do not depend on the tokenizer. An item is a quarter of the
steps of one document; its value is its bits per byte, and its label says which quarter.
"""

import math
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, final

import torch

from attnpred.errors import ConfigError
from attnpred.evaluation.book import demo_book
from attnpred.evaluation.tasks.base import Example, Item, Question, Session, Task, Wanted
from attnpred.evaluation.tasks.haystack import encode, opening
from attnpred.reading import read_text

QUARTERS = 4


@final
@dataclass(frozen=True, slots=True)
class Perplexity(Task):
    """Bits per byte of book text that continues a long prefix, by position."""

    metric: ClassVar[str] = "bits_per_byte"
    lower_is_better: ClassVar[bool] = True
    reads_texts: ClassVar[bool] = True

    def examples(self, tokenizer: Any, wanted: Wanted) -> list[Example]:
        texts = {name: encode(tokenizer, read_text(Path(name))) for name in wanted.texts}
        texts = texts or {"book": encode(tokenizer, demo_book())}
        begin = opening(tokenizer)
        size = wanted.length - len(begin) + wanted.steps + 1
        if wanted.steps < QUARTERS or size <= wanted.steps + 1:
            raise ConfigError(
                f"got {wanted.steps} steps after {wanted.length} tokens, expected at least {QUARTERS} after 2 or more"
            )
        for name, ids in texts.items():
            if len(ids) < size:
                raise ConfigError(
                    f"got text {name!r} of {len(ids)} tokens, expected at least {size}: give a longer one, or a shorter length"
                )
        found = []
        names = list(texts)
        for i in range(wanted.count):
            rng = random.Random(f"{wanted.seed}/perplexity/{wanted.length}/{i}")
            ids = texts[names[i % len(names)]]
            start = rng.randrange(len(ids) - size + 1)
            tokens = (*begin, *ids[start : start + size])
            labels = {"text": names[i % len(names)], "steps": wanted.steps}
            found.append(Example(str(i), tokens, (), labels=labels))
        return found

    def score(self, answer: str, question: Question) -> float:
        raise NotImplementedError("nothing is asked")

    def run(self, session: Session, example: Example) -> Iterator[Item]:
        """Feed the last tokens one by one; the first of them only as input."""
        steps = example.labels["steps"]
        context = len(example.tokens) - steps - 1
        cache = session.read(example.tokens[:context])
        given, wanted = (
            example.tokens[context:-1],
            torch.tensor(example.tokens[context + 1 :], dtype=torch.int64, device="cpu"),
        )
        found = session.follow(cache, given)
        bits = -found.gather(1, wanted[:, None])[:, 0] / math.log(2)
        for i, (part, ids) in enumerate(zip(bits.chunk(QUARTERS), wanted.chunk(QUARTERS), strict=True)):
            size = len(session.tokenizer.decode(ids).encode())
            labels = {
                "quarter": i + 1,
                "text": example.labels["text"],
                "first": context + 1 + i * len(bits) // QUARTERS,
            }
            yield Item(f"{example.name}/{i}", float(part.sum()) / max(1, size), labels)
