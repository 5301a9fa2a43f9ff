"""A document of 7,000 tokens on a real model: read once, and then asked at once."""

import time
from pathlib import Path

import pytest
import torch

from attnpred.config import CacheConfig
from attnpred.evaluation.book import demo_book
from attnpred.hf import attach, load_model, make_policy
from attnpred.serving.answering import Sampling
from attnpred.serving.conversation import Conversation
from attnpred.serving.kept import KeptTexts
from attnpred.serving.reader import Reader

pytestmark = [pytest.mark.real, pytest.mark.slow]

QUESTION = "Who is speaking here, and to whom?"
SECONDS = 2.0
"""Of the processor, until the first token of an answer: the clock of a busy machine says little."""


class _Words:
    """Hears an answer, and notes when it began."""

    first = 0.0

    def __call__(self, text: str) -> None:
        self.first = self.first or time.process_time()


def test_a_second_start_answers_at_once(tmp_path: Path) -> None:
    model, tokenizer = load_model("smollm2", device="cpu", dtype=torch.float32)
    settings = CacheConfig()
    ids = tokenizer(demo_book(), verbose=False)["input_ids"][:7000]
    policy = make_policy("quest", None, model.config, settings)
    opening, first, answers = list[float](), list[float](), list[str]()
    with attach(model, policy=policy, config=settings):
        for _ in range(2):
            reader = Reader(model, KeptTexts(tmp_path))
            with Conversation(reader, tokenizer, tokenizer.decode(ids), policy, settings, 8192) as conversation:
                start = time.process_time()
                conversation.open()
                opening.append(time.process_time() - start)
                start, words = time.process_time(), _Words()
                answers.append(conversation.ask(QUESTION, Sampling(8), words).text)
                first.append(words.first - start)
                assert not conversation.turns.note and 6900 < len(conversation.document) < 7200
    assert answers[0] == answers[1] != ""
    assert first[1] < SECONDS and opening[1] < opening[0] / 4, (opening, first)
