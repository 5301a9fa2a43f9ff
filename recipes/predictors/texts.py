"""Token sequences to train and to measure predictors on: books with planted facts, number tables, program text.

Training uses training books, tables and modules of Python's standard library, at several lengths; whoever measures
takes other books, other seeds and other program text (`recipes.demo_lm.corpus` names the held-out books).
"""

import random
import sysconfig
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from attnpred.evaluation.texts import book_with_facts, number_table

LENGTHS = (8192, 4096, 8192, 2048)
KINDS = ("book", "code", "table", "book", "table", "book", "code")


def training_documents(tokenizer: Any, books: Sequence[str], count: int) -> Iterator[tuple[str, Tensor]]:
    """Yield (name, token ids [1, L]) of `count` documents, less the modules that are too short."""
    library = Path(sysconfig.get_paths()["stdlib"])
    modules = sorted(path for path in library.glob("*.py") if path.stat().st_size > 60_000)
    for i in range(count):
        rng, kind, length = random.Random(1000 + i), KINDS[i % len(KINDS)], LENGTHS[i % len(LENGTHS)]
        if kind == "table":
            ids = tokenizer(number_table(rng, length), verbose=False)["input_ids"][:length]
        elif kind == "code":
            text = modules[i % len(modules)].read_text(encoding="utf-8", errors="replace")
            ids = tokenizer(text, verbose=False)["input_ids"][:length]
        else:
            ids = book_with_facts(tokenizer, books[(i * 5 + 3) % len(books)], rng, length)
        if len(ids) == length:
            yield f"{i:03d}-{kind}-{length}", torch.tensor([ids])
