"""Planted facts: short sentences hidden in a long text and asked for later.

A fact ties a key (a person, or an adjective and a noun) to a number. The question ends with the words that stood
before the number, so the right continuation is the number itself, and an answer is right only if every digit is.
Used by the demo, the tests and the training recipe of the demo LM; the generator is seeded and needs no data.
"""

import random
from dataclasses import dataclass

NAMES = (
    "Harriet Arthur Edward Margaret Walter Helen Richard Charlotte Henry Alice Robert Emily Thomas Agnes George Clara "
    "William Martha Philip Ruth Stephen Laura Francis Rose Hugh Dorothy Oliver Grace Simon Judith Martin Ellen Peter "
    "Louisa Gilbert Frances Albert Catherine Edmund Isabel Oscar Lydia Samuel Nora Victor Susan Daniel Julia Andrew "
    "Caroline Roger Beatrice Joseph Eleanor Lewis Marian Hector Sophia Felix Barbara Ralph Cecilia Leonard Flora"
).split()
ADJECTIVES = "silver golden wooden iron green white black yellow broken hidden ancient narrow northern southern stone glass".split()
NOUNS = (
    "gate tower bridge chapel garden harbour mill castle chest cabinet lantern clock mirror key ship carriage".split()
)
KEEPERS = ("secret number", "number", "code", "pass word", "house number", "lucky number")
OPENINGS = ("", " Remember this:", " Note well:", " It was written that", " Everyone knew that", " Mark this:")


@dataclass(frozen=True, slots=True)
class Fact:
    """One planted fact: `statement` goes into the text, `question` asks for it, `answer` is what must follow."""

    key: str
    statement: str
    question: str
    answer: str


def make_facts(rng: random.Random, count: int, digits: int = 4) -> list[Fact]:
    """Return `count` facts with different keys; each answer is a space and `digits` digits."""
    facts: dict[str, Fact] = {}
    while len(facts) < count:
        key = rng.choice(NAMES) if rng.random() < 0.6 else f"the {rng.choice(ADJECTIVES)} {rng.choice(NOUNS)}"
        if key in facts:
            continue
        answer = "".join(rng.choice("0123456789") for _ in range(digits))
        clause = f"the {rng.choice(KEEPERS)} of {key} is"
        opening = rng.choice(OPENINGS)
        stated = clause if opening else clause[0].upper() + clause[1:]
        asked = clause[0].upper() + clause[1:]
        facts[key] = Fact(
            key=key,
            statement=f"{opening} {stated} {answer}.",
            question=f" What is {clause[:-3]}? {asked}",
            answer=f" {answer}",
        )
    return list(facts.values())
