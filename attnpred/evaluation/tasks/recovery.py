"""The task `recovery`: what policies recover of the true attention, replayed on captured documents (`evaluation.recovery`).

One row for each kind of text, and one over all of them (`text` "all"), where every document counts the same. Kinds are
names of `KINDS`, or text files. `value` is the mean of the documents' recovery ratios, `documents` the ratios themselves.
A document is captured once for all policies; all documents of a length are replayed side by side.
"""

import dataclasses
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, final

import torch

from attnpred.config import CacheConfig
from attnpred.errors import ConfigError
from attnpred.evaluation import recovery
from attnpred.evaluation.book import demo_book
from attnpred.evaluation.tasks.base import Example, Item, Measured, Question, Session, Task, Wanted
from attnpred.evaluation.texts import book_with_facts, number_table, program_text
from attnpred.reading import read_text

KINDS = ("facts", "book", "code", "table")
HISTORY = CacheConfig().history
"""Rows before the steps, which a policy may look at."""


@final
@dataclass(frozen=True, slots=True)
class RecoveryTask(Task):
    """Share of the true attention that the chosen blocks hold, of what the best ones would."""

    metric: ClassVar[str] = "recovery_ratio"
    reads_texts: ClassVar[bool] = True
    replays: ClassVar[bool] = True

    def examples(self, tokenizer: Any, wanted: Wanted) -> list[Example]:
        rows = HISTORY + wanted.steps
        if wanted.length <= rows:
            raise ConfigError(f"got --lengths {wanted.length}, expected more than {rows} (history and steps)")
        found = []
        for kind in wanted.texts or KINDS:
            for i in range(wanted.count):
                rng = random.Random(f"{wanted.seed}/{kind}/{i}")
                ids = text_tokens(tokenizer, kind, wanted.length, i / wanted.count, rng)
                name = kind if kind in KINDS else Path(kind).stem
                found.append(Example(f"{name}-{i}", tuple(ids), (), labels={"text": name, "rows": rows}))
        return found

    def score(self, answer: str, question: Question) -> float:
        raise NotImplementedError("nothing is asked")

    def prepare(self, session: Session, example: Example) -> Example:
        """Capture the document."""
        tokens = torch.tensor([example.tokens], dtype=torch.int64, device="cpu")
        kind, rows = example.labels["text"], example.labels["rows"]
        document = recovery.read_document(session.model, tokens, rows, kind, example.name)
        return dataclasses.replace(example, reference=document)

    def measure(self, session: Session, examples: Sequence[Example], limit: int | None) -> list[Measured]:
        documents = [example.reference for example in examples[:limit]]
        result = recovery.measure(documents, session.policy, session.settings)
        kinds = [document.kind for document in documents]
        return [_measured(result, documents, kind) for kind in [*dict.fromkeys(kinds), "all"]]


def _measured(result: recovery.Recovery, documents: Sequence[recovery.Document], kind: str) -> Measured:
    places = [i for i, document in enumerate(documents) if kind in (document.kind, "all")]
    kept, best, ratios = result.kept[places], result.best[places], result.ratios[places]
    by_document = kept.mean((1, 2)) / best.mean((1, 2))
    items = [
        Item(documents[i].name, value, {"text": documents[i].kind})
        for i, value in zip(places, by_document.tolist(), strict=True)
    ]
    figures = {
        "text": kind,
        "recovery": float(kept.mean()),
        "recovery_ratio": float(by_document.double().mean()),
        "worst_decile": float(ratios.flatten().sort().values[: max(1, ratios.numel() // 10)].mean()),
        "output_error": float(result.error[places].mean()),
        "hit_rate": float(result.hits[places].mean()),
        "churn": float(result.new[places].mean()),
        "late_share": result.late if len(places) == len(documents) else None,
        "state_share": result.state,
        "by_head": (kept.mean(0) / best.mean(0)).tolist(),
        "recovery_by_head": kept.mean(0).tolist(),
        "by_position": [float(quarter.mean()) for quarter in ratios.mean((0, 1, 2)).chunk(4)],
        "documents": by_document.tolist(),
        "document_recovery": kept.mean((1, 2)).tolist(),
        "document_errors": result.error[places].mean((1, 2)).tolist(),
    }
    return Measured(items, figures)


def text_tokens(tokenizer: Any, kind: str, length: int, place: float, rng: random.Random) -> list[int]:
    """Return `length` token ids; `place` says from which part of a long text. Raises `ConfigError`."""
    if kind == "facts":
        book = demo_book()
        size = min(len(book), 6 * length)
        ids = book_with_facts(tokenizer, book[int(place * (len(book) - size)) :][: size + 4000], rng, length)
        if len(ids) < length:
            raise ConfigError(f"got a book of {len(ids)} tokens, expected at least {length}: use shorter documents")
        return ids
    if kind == "table":
        return list(tokenizer(number_table(rng, 2 * length), verbose=False)["input_ids"][:length])
    text = {"book": demo_book, "code": program_text}.get(kind, lambda: _read(kind))()
    ids = list(tokenizer(text, verbose=False)["input_ids"])
    if len(ids) < length:
        raise ConfigError(f"got a text {kind!r} of {len(ids)} tokens, expected at least {length}: give a longer one")
    start = int(place * (len(ids) - length))
    return ids[start : start + length]


def _read(file: str) -> str:
    return read_text(Path(file), f"a text file or one of {', '.join(KINDS)}")
