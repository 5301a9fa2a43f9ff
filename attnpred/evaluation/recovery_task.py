"""The task `recovery`: rows of figures for policies, budgets, lengths and kinds of text (see `recovery.py`).

One row per policy, budget, length and kind, and one over all kinds (`text` "all"), where every document counts the same.
`value` is the mean of the documents' recovery ratios, `interval` its 95 % interval by bootstrap over documents,
`documents` the ratios themselves, so that any two policies can be compared pairwise.
"""

import dataclasses
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from attnpred.config import CacheConfig
from attnpred.errors import ConfigError
from attnpred.evaluation.book import demo_book
from attnpred.evaluation.recovery import Document, Recovery, measure, read_document
from attnpred.evaluation.texts import book_with_facts, number_table, program_text
from attnpred.evaluation.variants import Variant

KINDS = ("facts", "book", "code", "table")
RESAMPLES = 2000


def documents(
    model: Any,
    tokenizer: Any,
    kinds: Sequence[str],
    length: int,
    count: int,
    rows: int,
    seed: int,
    block_size: int = 16,
) -> list[Document]:
    """Read `count` documents of each of `kinds`: names of `KINDS`, or text files."""
    found = []
    for kind in kinds:
        for i in range(count):
            rng = random.Random(f"{seed}/{kind}/{i}")
            ids = _tokens(tokenizer, kind, length, i / count, rng)
            name = kind if kind in KINDS else Path(kind).stem
            found.append(read_document(model, torch.tensor([ids]), rows, name, f"{name}-{i}", block_size))
    return found


def _tokens(tokenizer: Any, kind: str, length: int, place: float, rng: random.Random) -> list[int]:
    """Return `length` token ids; `place` says from which part of a long text."""
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
    try:
        return Path(file).read_text(encoding="utf-8", errors="replace")
    except OSError:
        raise ConfigError(f"got text {file!r}, expected a file or one of {', '.join(KINDS)}") from None


def rows(
    found: Sequence[Document],
    variants: Sequence[Variant],
    budgets: Sequence[float],
    model_config: Any,
    settings: CacheConfig,
    facts: dict[str, Any],
) -> Iterator[dict[str, Any]]:
    """Yield rows for documents of one length; `facts` go into every row."""
    for variant in variants:
        for budget in budgets:
            policy, own = variant.make(model_config, dataclasses.replace(settings, budget=budget))
            result = measure(found, policy, own)
            common = facts | {"policy": variant.label, "budget": budget, "task": "recovery", "length": found[0].length}
            kinds = [document.kind for document in found]
            for kind in [*dict.fromkeys(kinds), "all"]:
                places = [i for i, own_kind in enumerate(kinds) if kind in (own_kind, "all")]
                yield common | {"text": kind} | _figures(result, places, len(kinds))


def _figures(result: Recovery, places: list[int], total: int) -> dict[str, Any]:
    kept, best, ratios = result.kept[places], result.best[places], result.ratios[places]
    by_document = kept.mean((1, 2)) / best.mean((1, 2))
    quarters = ratios.mean((0, 1, 2)).chunk(4)
    return {
        "metric": "recovery_ratio",
        "value": float(by_document.mean()),
        "interval": bootstrap(by_document),
        "n": len(places),
        "recovery": float(kept.mean()),
        "recovery_ratio": float(by_document.mean()),
        "worst_decile": float(ratios.flatten().sort().values[: max(1, ratios.numel() // 10)].mean()),
        "hit_rate": float(result.hits[places].mean()),
        "churn": float(result.new[places].mean()),
        "late_share": result.late if len(places) == total else None,
        "state_share": result.state,
        "by_head": (kept.mean(0) / best.mean(0)).tolist(),
        "recovery_by_head": kept.mean(0).tolist(),
        "by_position": [float(quarter.mean()) for quarter in quarters],
        "documents": by_document.tolist(),
    }


def bootstrap(values: Tensor, seed: int = 0) -> list[float]:
    """Return the 95 % interval of the mean of `values`, resampled with replacement."""
    generator = torch.Generator().manual_seed(seed)
    picks = torch.randint(len(values), (RESAMPLES, len(values)), generator=generator)
    means = values[picks].mean(1).sort().values
    return [float(means[int(0.025 * RESAMPLES)]), float(means[int(0.975 * RESAMPLES) - 1])]
