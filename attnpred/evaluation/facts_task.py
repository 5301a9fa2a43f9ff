"""Planted facts as a task: hide them in book text, ask for each after the whole text, compare digit by digit."""

import random
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from attnpred.errors import ConfigError
from attnpred.evaluation.facts import Fact, make_facts


@dataclass(frozen=True, slots=True)
class FactsDocument:
    """A text of exactly the asked length that holds `facts`; `tokens` [1, L]."""

    tokens: Tensor
    facts: list[Fact]


def plant(tokenizer: Any, book: Tensor, length: int, count: int, seed: int) -> FactsDocument:
    """Hide `count` facts at random sentence ends of the first tokens of `book` [L']; the whole is `length` tokens."""
    rng = random.Random(seed)
    facts = make_facts(rng, count)
    pieces = [tokenizer(fact.statement)["input_ids"] for fact in facts]
    room = length - sum(map(len, pieces))
    if room <= 0 or len(book) < room:
        raise ConfigError(
            f"got {len(book)} tokens of text, expected at least {room}: give a longer text, or a shorter context"
        )
    body = book[:room].tolist()
    stops = {i for text in (".", "!", "?") for i in tokenizer(text)["input_ids"]}
    ends = [i + 1 for i, token in enumerate(body) if token in stops] or [room // 2]
    for place, piece in zip(sorted((rng.choice(ends) for _ in facts), reverse=True), pieces, strict=True):
        body[place:place] = piece
    return FactsDocument(torch.tensor([body], dtype=torch.int64, device="cpu"), facts)


@torch.no_grad()
def answer(model: Any, tokenizer: Any, document: FactsDocument, fact: Fact) -> str:
    """Ask for one fact after the whole document with stock `generate`, greedily; return the continuation."""
    question = tokenizer(fact.question, return_tensors="pt")["input_ids"]
    tokens = torch.cat((document.tokens, question), 1).to(model.device)
    wanted = len(tokenizer(fact.answer)["input_ids"])
    out = model.generate(
        tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=wanted, min_new_tokens=wanted, do_sample=False
    )
    return str(tokenizer.decode(out[0, tokens.shape[1] :]))


def answers(model: Any, tokenizer: Any, documents: list[FactsDocument]) -> list[str]:
    """Return the continuation of every question about every document, in order."""
    return [answer(model, tokenizer, document, fact) for document in documents for fact in document.facts]


def score(model: Any, tokenizer: Any, documents: list[FactsDocument]) -> tuple[int, int]:
    """Return (facts answered exactly, facts asked)."""
    wanted = [fact.answer for document in documents for fact in document.facts]
    given = answers(model, tokenizer, documents)
    return sum(a == b for a, b in zip(given, wanted, strict=True)), len(wanted)
