"""One text, one set of questions, several columns: the full cache, and policies that read a part of it.

The text is read once, with full attention. Each column takes it over (`hf.carry_over`), reads the last tokens itself, and
answers every question on a fork, so that no answer is seen by the next question. A question is read with everything, as
`generate` does; every token of an answer is a step of the column's policy.

Divergence (KL) is measured over the full cache's answers: each column is given them token by token, and its distribution
over the next token is compared with that of the full cache, in nats.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from attnpred import hf
from attnpred.config import CacheConfig
from attnpred.evaluation.quiz import Quiz, QuizFact
from attnpred.evaluation.session import Held, PolicySession
from attnpred.evaluation.tasks.base import Question
from attnpred.policies.base import Policy
from attnpred.policies.full import Full

CHUNK = 512
"""Tokens of the text read between two reports."""
MOST_TOKENS = 16
"""Of an answer."""

Report = Callable[[int, int], None]
"""Told how many tokens of how many have been read."""


@dataclass(frozen=True, slots=True)
class Given:
    """An answer to one question: its text and tokens, and whether it is right."""

    fact: QuizFact
    text: str
    ids: list[int]
    is_right: bool


class Listener(Protocol):
    """Told what goes on, as it goes on."""

    def asked(self, fact: QuizFact) -> None:
        """A question is being read."""

    def heard(self, piece: str) -> None:
        """The answer goes on so."""

    def answered(self, given: Given) -> None:
        """That was the answer."""


@dataclass(frozen=True, slots=True)
class Column:
    """What a column answered and cost. kl: nats per token, None for the full cache. Bytes are of all layers together."""

    policy: str
    budget_tokens: int
    answers: list[Given]
    kl: float | None
    costs: dict[str, Any]

    @property
    def correct(self) -> int:
        """How many answers are right."""
        return sum(given.is_right for given in self.answers)

    def as_dict(self) -> dict[str, Any]:
        """Return plain values."""
        return {
            "policy": self.policy,
            "budget_tokens": self.budget_tokens,
            "correct": self.correct,
            "total": len(self.answers),
            "kl": self.kl,
            **self.costs,
            "answers": [{key: value for key, value in asdict(given).items() if key != "ids"} for given in self.answers],
        }


@dataclass(frozen=True, slots=True)
class ReadText:
    """A text that was read but for its last tokens, in a cache with full attention; seconds it took."""

    quiz: Quiz
    cache: hf.TieredCache
    seconds: float


@torch.no_grad()
def read_text(model: Any, quiz: Quiz, settings: CacheConfig, report: Report) -> ReadText:
    """Read the text of `quiz` in chunks, but for the tokens that each column reads itself."""
    last = len(quiz.ids) - settings.history - 1
    tokens = torch.tensor([quiz.ids[:last]], device=model.device, dtype=torch.int64)
    start = time.perf_counter()
    with hf.attach(model, policy="full", config=settings) as attached:
        cache = attached.new_cache()
        for first in range(0, last, CHUNK):
            report(first, last)
            part = tokens[:, first : first + CHUNK]
            model(part, cache=cache, use_cache=True, logits_to_keep=1)
    report(last, last)
    return ReadText(quiz, cache, time.perf_counter() - start)


class Asking:
    """The questions of a text, answered by one column after the other; the first has to be the full cache."""

    def __init__(self, model: Any, tokenizer: Any, text: ReadText) -> None:
        self.model, self.tokenizer, self.text = model, tokenizer, text
        self._full: list[tuple[list[int], Tensor]] = []

    def column(self, label: str, policy: Policy[Any], settings: CacheConfig, listener: Listener) -> Column:
        """Ask every question."""
        quiz, is_full = self.text.quiz, isinstance(policy, Full)
        answers: list[Given] = []
        divergences: list[Tensor] = []
        settings = policy.settle(settings)
        with PolicySession(self.model, self.tokenizer, policy, settings) as session:
            held = session.go_on(self.text.cache, quiz.ids)
            for i, fact in enumerate(quiz.facts):
                listener.asked(fact)
                with _asked(session, held, quiz.question_ids(self.tokenizer, fact)) as asked:
                    given = self._answer(session, asked, fact, listener)
                    listener.answered(given)
                    answers.append(given)
                    wanted = given.ids if is_full else self._full[i][0]
                    own = session.weigh(asked, wanted)
                if is_full:
                    self._full.append((given.ids, own))
                else:
                    full = self._full[i][1]
                    divergences.append((full.exp() * (full - own)).sum(-1))
            held.cache.close()
        kl = None if is_full else float(torch.cat(divergences).mean())
        budget = len(quiz.ids) if is_full else settings.budget_blocks(len(quiz.ids)) * settings.block_size
        return Column(label, budget, answers, kl, session.costs())

    def _answer(self, session: PolicySession, asked: Held, fact: QuizFact, listener: Listener) -> Given:
        ids: list[int] = []

        def text() -> str:
            return str(self.tokenizer.decode(ids, skip_special_tokens=True))

        def heard(token: int) -> None:
            known = text()
            ids.append(token)
            listener.heard(text()[len(known) :])

        branch = session.fork(asked)
        session.generate(branch, Question((), (fact.answer,), MOST_TOKENS), heard)
        branch.cache.close()
        return Given(fact, text().strip(), ids, fact.is_right(text()))


@contextmanager
def _asked(session: PolicySession, held: Held, question: list[int]) -> Iterator[Held]:
    """Give a fork that has read a question but for its last token, and close it."""
    asked = session.fork(held)
    try:
        session.read_on(asked, question)
        yield asked
    finally:
        asked.cache.close()
