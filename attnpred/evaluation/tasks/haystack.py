"""Text to hide things in: the embedded book, or files; cut anywhere, round and round if it is too short.

Pieces are put in where sentences end. Everything is token ids, made without special tokens but for those a tokenizer
begins every text with, so that lengths are exact for any tokenizer.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from attnpred.errors import ConfigError
from attnpred.evaluation.book import demo_book
from attnpred.evaluation.tasks.base import Wanted
from attnpred.reading import read_text


def encode(tokenizer: Any, text: str) -> list[int]:
    """Return the ids of `text` and nothing else."""
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def opening(tokenizer: Any) -> list[int]:
    """Return what this tokenizer begins every text with: its begin-of-text token, or nothing."""
    first = list(tokenizer("a", verbose=False)["input_ids"])[:1]
    return first if first == [tokenizer.bos_token_id] else []


@dataclass(frozen=True, slots=True)
class Haystack:
    """tokens: the whole text; stops: ids of tokens with which a sentence ends."""

    tokens: Sequence[int]
    stops: frozenset[int]

    @classmethod
    def of(cls, tokenizer: Any, wanted: Wanted) -> "Haystack":
        """Return the text that `wanted` names. Raises `ConfigError`."""
        return cls.from_text(
            tokenizer, "\n\n".join(map(read_text, map(Path, wanted.texts))) if wanted.texts else demo_book()
        )

    @classmethod
    def from_text(cls, tokenizer: Any, text: str) -> "Haystack":
        """Return a text to cut from. Raises `ConfigError` if it is empty."""
        tokens = encode(tokenizer, text)
        if not tokens:
            raise ConfigError("got a text without a word, expected words to hide things among")
        stops = frozenset(token for token in set(tokens) if tokenizer.decode([token]).endswith((".", "!", "?")))
        return cls(tokens, stops)

    def cut(self, rng: random.Random, size: int) -> list[int]:
        """Return `size` tokens that begin with a sentence, somewhere in the text; after its end it begins again."""
        start = rng.randrange(len(self.tokens))
        for _ in range(1000):  # a text without sentences is cut anywhere
            if self.tokens[start - 1] in self.stops:
                break
            start = (start + 1) % len(self.tokens)
        return [self.tokens[(start + i) % len(self.tokens)] for i in range(size)]

    def hide(self, body: list[int], pieces: Sequence[Sequence[int]], depths: Sequence[float]) -> list[int]:
        """Return `body` with each piece after the sentence that ends nearest to its depth (0 begin, 1 end)."""
        ends = [i + 1 for i, token in enumerate(body) if token in self.stops] or [len(body) // 2]
        places = [min(ends, key=lambda end: abs(end - depth * len(body))) for depth in depths]
        result = list(body)
        for place, piece in sorted(zip(places, pieces, strict=True), key=lambda pair: -pair[0]):
            result[place:place] = piece
        return result


def room_for(wanted: Wanted, task: str, *parts: int) -> int:
    """Return how many tokens of `wanted.length` are left after `parts`. Raises `ConfigError` if nothing is."""
    room = wanted.length - sum(parts)
    if room <= 0:
        raise ConfigError(
            f"got length {wanted.length} for task {task!r}, expected more than {sum(parts)} tokens, which it takes at least"
        )
    return room
