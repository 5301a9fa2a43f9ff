"""What the RULER generators share (Hsieh et al., 2024, arXiv 2404.06654): texts to hide things in, keys, values, scoring.

The wording of the prompts is the published one, since it is the benchmark. Documents are exact in length: text that is
only there to fill is cut at its beginning.
"""

import random
import uuid
from collections.abc import Iterator, Sequence
from typing import Any

from attnpred.errors import ConfigError
from attnpred.evaluation.facts import ADJECTIVES, NOUNS
from attnpred.evaluation.tasks.base import Question

NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again.\n"


def share_found(answer: str, question: Question) -> float:
    """Return the share of the reference strings that the answer holds, in any case (RULER's string match, all)."""
    return sum(wanted.lower() in answer.lower() for wanted in question.answers) / len(question.answers)


def any_found(answer: str, question: Question) -> float:
    """Return 1 if the answer holds any of the reference strings (RULER's string match, part)."""
    return float(any(wanted.lower() in answer.lower() for wanted in question.answers))


def number(rng: random.Random) -> str:
    """Return seven digits."""
    return str(rng.randrange(10**6, 10**7))


def code(rng: random.Random) -> str:
    """Return a random UUID."""
    return str(uuid.UUID(int=rng.getrandbits(128), version=4))


def word_pairs(rng: random.Random) -> Iterator[str]:
    """Yield different keys of two words, first those without a number behind them."""
    pairs = [f"{adjective}-{noun}" for adjective in ADJECTIVES for noun in NOUNS]
    rng.shuffle(pairs)
    yield from pairs
    for i, pair in enumerate(pairs * 1000):
        yield f"{pair}-{i // len(pairs) + 2}"


def filled(pieces: Iterator[list[int]], room: int, task: str) -> list[list[int]]:
    """Return pieces that are `room` tokens in all; the first one is cut at its beginning. Raises `ConfigError`."""
    found: list[list[int]] = []
    size = 0
    while size < room:
        found.append(next(pieces))
        size += len(found[-1])
    if not found:
        raise ConfigError(f"got no room to fill in task {task!r}, expected a greater length")
    found[0] = found[0][size - room :]
    return found


def spread(rng: random.Random, filler: Sequence[list[int]], hidden: Sequence[list[int]]) -> list[int]:
    """Return all pieces in one list of ids: `hidden` in their order, at random places between those of `filler`."""
    places = sorted(rng.randrange(1, len(filler) + 1) for _ in hidden)
    result: list[int] = []
    for i, piece in enumerate(filler):
        result += [token for place, own in zip(places, hidden, strict=True) if place == i for token in own]
        result += piece
    return result + [token for place, own in zip(places, hidden, strict=True) if place == len(filler) for token in own]


def asked(tokenizer: Any, tokens: Sequence[int], answers: Sequence[str], size: int, **labels: Any) -> Question:
    """Return a question of these ids."""
    return Question(tuple(tokens), tuple(answers), size, labels=labels)
