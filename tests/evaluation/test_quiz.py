"""The quiz: every fact stands once where it is said to, and an answer is right only with the whole number."""

import pytest
from transformers import AutoTokenizer

from attnpred.errors import ConfigError
from attnpred.evaluation.quiz import FACTS, TEXT, make_quiz
from attnpred.hf import DEMO_MODEL

TEMPLATE = "{% for message in messages %}<{{ message['role'] }}>{{ message['content'] }}{% endfor %}<answer>"


def tokenizer() -> object:
    made = AutoTokenizer.from_pretrained(DEMO_MODEL)
    made.chat_template = TEMPLATE
    return made


@pytest.mark.parametrize("seed", [1, 2])
def test_every_fact_stands_where_it_is_said_to(seed: int) -> None:
    quiz = make_quiz(tokenizer(), TEXT.read_text(encoding="utf-8"), seed)
    assert sorted(quiz.facts, key=str) == sorted(FACTS, key=str) and quiz.places == sorted(quiz.places)
    for fact, place in zip(quiz.facts, quiz.places, strict=True):
        assert quiz.text.count(fact.statement) == 1 and quiz.text.startswith(fact.statement + " ", place)
        assert quiz.text[place - 1] == " " and fact.answer in fact.statement
    assert len(quiz.ids) == len(quiz.spans) and all(a <= b for a, b in quiz.spans)
    assert quiz.text.startswith("<system>") and quiz.after == "<answer>"


def test_another_seed_hides_them_elsewhere() -> None:
    book = TEXT.read_text(encoding="utf-8")
    first, second, again = (make_quiz(tokenizer(), book, seed) for seed in (1, 2, 1))
    assert first.places != second.places and first == again


def test_no_fact_gives_away_another() -> None:
    for fact in FACTS:
        assert [other for other in FACTS if other.is_right(fact.statement)] == [fact]
        assert not fact.is_right(fact.question)


@pytest.mark.parametrize(
    ("given", "right"),
    [("It is 88 pounds.", True), ("88", True), ("It is 885.", False), ("It is 188.", False), ("eighty-eight", False)],
)
def test_an_answer_is_right_only_with_the_whole_number(given: str, right: bool) -> None:
    fact = next(fact for fact in FACTS if fact.answer == "88")
    assert fact.is_right(given) == right


def test_a_text_without_sentences_is_refused() -> None:
    with pytest.raises(ConfigError, match="got a text without 8 sentences"):
        make_quiz(tokenizer(), "word " * 400)
