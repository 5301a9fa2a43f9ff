"""Planted facts can be found by who reads the text, and are asked for in the words that stood before the number."""

import random

import pytest
import torch

from attnpred.errors import ConfigError
from attnpred.evaluation.book import demo_book
from attnpred.evaluation.facts import make_facts
from attnpred.evaluation.facts_task import plant
from attnpred.hf import load_model


@pytest.fixture(scope="module")
def tokenizer() -> object:
    return load_model("demo")[1]


def test_facts_have_different_keys_and_questions_lead_to_the_answer() -> None:
    for seed in range(20):
        facts = make_facts(random.Random(seed), 12)
        assert len({fact.key for fact in facts}) == 12
        for fact in facts:
            lead = fact.question.split("? ")[1]
            assert lead.lower() + fact.answer in fact.statement.lower()
            assert fact.answer[0] == " " and fact.answer[1:].isdigit() and len(fact.answer) == 5


def test_the_same_seed_gives_the_same_facts() -> None:
    assert make_facts(random.Random(3), 5) == make_facts(random.Random(3), 5)
    assert make_facts(random.Random(3), 5) != make_facts(random.Random(4), 5)


def test_planting_keeps_the_length_and_the_text(tokenizer: object) -> None:
    book = tokenizer(demo_book()[:20_000], return_tensors="pt", verbose=False)["input_ids"][0]
    document = plant(tokenizer, book, 1024, 4, seed=5)
    assert document.tokens.shape == (1, 1024)
    text = tokenizer.decode(document.tokens[0])
    for fact in document.facts:
        assert text.count(fact.statement) == 1
        text = text.replace(fact.statement, "")
    assert demo_book().startswith(text)


def test_a_text_that_is_too_short_is_refused(tokenizer: object) -> None:
    with pytest.raises(ConfigError, match="got 10 tokens of text, expected at least"):
        plant(tokenizer, torch.arange(10), 200, 1, seed=0)
