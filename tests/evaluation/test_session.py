"""A session counts decode steps and nothing else, and says what stock `generate` says."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from attnpred.config import CacheConfig
from attnpred.errors import ConfigError
from attnpred.evaluation.book import demo_book
from attnpred.evaluation.session import PolicySession
from attnpred.evaluation.tasks import Question
from attnpred.evaluation.variants import parse_variant
from attnpred.hf import load_model

SETTINGS = CacheConfig(budget=0.4, num_sink_tokens=16, recent_window=32, dense_layers=0)
Open = Callable[..., PolicySession]


@pytest.fixture(scope="module")
def demo() -> tuple[Any, Any]:
    return load_model("demo", device="cpu")


@pytest.fixture
def opened(demo: tuple[Any, Any]) -> Open:
    def make(word: str, settings: CacheConfig = SETTINGS) -> PolicySession:
        policy, own = parse_variant(word).make(demo[0].config, settings)
        return PolicySession(*demo, policy, own)

    return make


@pytest.fixture(scope="module")
def ids(demo: tuple[Any, Any]) -> list[int]:
    return demo[1](demo_book()[30_000:33_000], verbose=False)["input_ids"][:320]


def asked(tokens: list[int], new: int = 6) -> Question:
    return Question(tuple(tokens), ("",), new)


def stock(demo: tuple[Any, Any], tokens: list[int], new: int) -> list[int]:
    prompt = torch.tensor([tokens])
    out = demo[0].generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=new, do_sample=False, pad_token_id=0
    )
    return out[0, len(tokens) :].tolist()


def test_the_full_cache_answers_like_stock_generate_apart_in_turn_and_with_nothing_asked(
    demo: tuple[Any, Any], opened: Open, ids: list[int]
) -> None:
    document, first, second = ids[:300], ids[300:308], ids[308:310]
    one, two, empty = (stock(demo, [*document, *more], 6) for more in (first, second, []))
    turn = stock(demo, [*document, *first, *one, *second], 6)
    with opened("full") as session:
        held = session.read(document)
        assert session.generate(session.fork(held), asked(first)) == one
        assert session.generate(session.fork(held), asked(second)) == two  # the fork before left no trace
        assert session.generate(session.fork(held), asked([])) == empty
        assert session.ask(held, asked(first)) == demo[1].decode(one)
        assert session.generate(held, asked(second)) == turn
    assert "generate" not in vars(demo[0])


def test_followed_tokens_get_the_models_own_probabilities(demo: tuple[Any, Any], opened: Open, ids: list[int]) -> None:
    with torch.no_grad():
        logits = demo[0](torch.tensor([ids])).logits[0]
    wanted = torch.log_softmax(logits[300:320].float(), -1)
    with opened("full") as session:
        held = session.read(ids[:300])
        found = torch.cat((session.follow(held, ids[300:312]), session.follow(held, ids[312:320])))
    assert torch.allclose(found, wanted, atol=2e-4)


@pytest.mark.parametrize("word", ["streaming", "snapkv", "quest", "predicted"])
def test_costs_are_those_of_the_decode_steps(opened: Open, ids: list[int], word: str) -> None:
    with opened(word) as session:
        held = session.read(ids[:300])
        for _ in range(2):
            session.generate(session.fork(held), asked(ids[300:310], 4))
        costs = session.costs()
    assert session._counts.steps == 2 * 4 * session._layers  # every token of an answer, no other call
    assert 100 < costs["tokens_attended"] < 140
    assert costs["compression"] > 1.5 and costs["bytes_per_step"] > 0 and costs["slow_bytes"] == 0
    assert costs["ms_per_token"] > 0 and costs["prefill_seconds"] > 0 and costs["hit_rate"] is None


def test_an_offloaded_session_says_what_moved(opened: Open, ids: list[int]) -> None:
    from dataclasses import replace

    with opened("quest", replace(SETTINGS, offload="cpu")) as session:
        session.generate(session.read(ids[:300]), asked(ids[300:310], 4))
        costs = session.costs()
    assert costs["slow_bytes"] > 0 and costs["moved_bytes_per_step"] > 0 and 0 <= costs["hit_rate"] <= 1


def test_recovery_is_measured_when_asked_for(opened: Open, ids: list[int]) -> None:
    from dataclasses import replace

    with opened("streaming", replace(SETTINGS, measure_recovery=True)) as session:
        session.generate(session.read(ids[:300]), asked(ids[300:310], 4))
        found = session.recovery()
    assert 0 < found["recovery"] < found["recovery_ratio"] < 1


def test_a_document_of_one_token_is_refused(opened: Open) -> None:
    with opened("full") as session, pytest.raises(ConfigError, match="got a document of 1 tokens, expected at least 2"):
        session.read([5])
