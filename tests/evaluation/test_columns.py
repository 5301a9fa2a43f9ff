"""Columns: a policy that may read everything is the full cache, and one that may not is somewhere else."""

from dataclasses import replace

import pytest
import torch

from attnpred.config import CacheConfig
from attnpred.evaluation.book import demo_book
from attnpred.evaluation.columns import Asking, read_text
from attnpred.evaluation.quiz import QuizFact, make_quiz
from attnpred.evaluation.shown import look_at
from attnpred.hf import load_model
from attnpred.policies.ema import Ema
from attnpred.policies.full import Full

SETTINGS = CacheConfig(budget=128, num_sink_tokens=16, recent_window=32, dense_layers=0, calibration_interval=0)


class Silent:
    """Notes what it is told."""

    def __init__(self) -> None:
        self.pieces: list[str] = []

    def asked(self, fact: QuizFact) -> None:
        self.pieces.append("")

    def heard(self, piece: str) -> None:
        self.pieces[-1] += piece

    def answered(self, given: object) -> None:
        pass


@pytest.mark.slow
def test_a_column_that_reads_everything_is_the_full_cache() -> None:
    model, tokenizer = load_model("demo")
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    quiz = make_quiz(tokenizer, demo_book()[:6000])
    told: list[int] = []
    text = read_text(model, quiz, SETTINGS, lambda done, total: told.append(done))
    assert text.cache.get_seq_length() == len(quiz.ids) - SETTINGS.history - 1 == told[-1]
    asking, heard = Asking(model, tokenizer, text), Silent()
    full = asking.column("full", Full(), SETTINGS, heard)
    assert [piece.strip() for piece in heard.pieces] == [given.text for given in full.answers]
    whole = asking.column("ema", Ema(), replace(SETTINGS, budget=1.0), Silent())
    sparse = asking.column("ema", Ema(), SETTINGS, Silent())
    assert [given.ids for given in whole.answers] == [given.ids for given in full.answers]
    assert full.kl is None and whole.kl is not None and sparse.kl is not None
    assert abs(whole.kl) < 1e-5 < sparse.kl
    assert sparse.costs["tokens_attended"] <= 128 < len(quiz.ids) <= full.costs["tokens_attended"]

    shown = look_at(model, tokenizer, text, full.answers[0], Ema(), SETTINGS)
    steps, blocks = len(full.answers[0].ids), -(-len(quiz.ids) // 16)
    assert shown.true.shape == shown.selected.shape == (steps, blocks) and len(shown.spans) == blocks
    assert shown.forecast is not None and shown.forecast.shape == (steps, blocks)
    assert shown.heads == 10 and shown.share[0] == 1  # sinks: all heads at all steps
    assert 0.03 < float(shown.share.mean()) <= 128 / len(quiz.ids) + 0.02
    assert torch.isfinite(shown.true).all() and bool((shown.true.sum(1) > 0).all())
