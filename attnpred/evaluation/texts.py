"""Texts to measure on: a book with planted facts that are asked for at its end, number tables, program text.

The program text is this package's source as it once was: later changes of the package leave it as it is.
"""

import random
from pathlib import Path
from typing import Any

from attnpred.evaluation.facts import make_facts

CODE = Path(__file__).parent.parent / "assets" / "code.txt"


def number_table(rng: random.Random, characters: int) -> str:
    """Return a table of at least `characters` characters, in one of three styles; names come back again and again."""
    names = [f"{rng.choice('ABCDEFGHKLMNPRST')}{rng.randrange(100, 999)}" for _ in range(60)]
    style = rng.randrange(3)
    rows: list[str] = []
    size = 0
    while size < characters:
        name = rng.choice(names)
        if style == 0:
            row = f"{len(rows):4d}  {name}  {rng.randrange(10**4):5d}  {rng.random() * 100:6.2f}"
        elif style == 1:
            row = f"{name},{rng.randrange(1000)},{rng.randrange(1000)},{rng.randrange(1000)}"
        else:
            row = f"| {name} | {len(rows) * 7 % 1000} | {rng.randrange(100)} | {rng.choice(('yes', 'no', 'none'))} |"
        rows.append(row)
        size += len(row) + 1
    return "\n".join(rows)


def program_text() -> str:
    """Return the text of some program files, one after the other."""
    return CODE.read_text(encoding="utf-8")


def book_with_facts(tokenizer: Any, book: str, rng: random.Random, length: int) -> list[int]:
    """Return `length` tokens: facts are stated in the first four fifths and asked for near the end, between sentences."""
    start = rng.randrange(max(1, len(book) - 9 * length))
    facts = make_facts(rng, rng.choice((1, 2, 4, 6, 8)))
    stated = sorted(((rng.random() * 0.8 * length, fact) for fact in facts), key=lambda pair: pair[0])
    asking = length // 12
    asked = sorted(length - asking + rng.random() * (asking - 40) for _ in range(6))
    ids: list[int] = []
    for sentence in book[start : start + 9 * length].split(". "):
        ids += tokenizer(sentence + ".")["input_ids"]
        while stated and stated[0][0] <= len(ids):
            ids += tokenizer(stated.pop(0)[1].statement)["input_ids"]
        while asked and asked[0] <= len(ids):
            fact = rng.choice(facts)
            ids += tokenizer(fact.question + fact.answer + ".")["input_ids"]
            asked.pop(0)
        if len(ids) >= length:
            return ids[:length]
    return ids
