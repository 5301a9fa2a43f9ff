"""A text that was read once serves every policy, and none can tell the difference."""

from typing import Any

import pytest
import torch

from attnpred.config import CacheConfig
from attnpred.evaluation.session import PolicySession, Readings
from attnpred.evaluation.variants import parse_variant
from attnpred.policies import POLICIES
from tests.models import prompt, tiny_model

SETTINGS = CacheConfig(budget=64, num_sink_tokens=16, recent_window=16, dense_layers=1)
NEED_MORE = ("pod", "seer", "sepllm", "fastgen")  # a file of groups, a gate, a tokenizer
TEXT = prompt(1, 150)[0].tolist()
MORE = prompt(1, 12, seed=1)[0].tolist()


class NoTokenizer:
    pad_token_id = 0


def session(family: str, word: str, readings: Readings | None = None, settings: CacheConfig = SETTINGS) -> Any:
    model = tiny_model(family)
    policy, own = parse_variant(word).make(model.config, settings)
    return PolicySession(model, NoTokenizer(), policy, own, readings)


def says(family: str, word: str, readings: Readings | None = None) -> torch.Tensor:
    with session(family, word, readings) as opened:
        return opened.follow(opened.fork(opened.read(TEXT)), MORE)


def read_with_full(family: str) -> Readings:
    readings = Readings(1 << 30)
    with session(family, "full", readings) as opened:
        opened.read(TEXT)
    return readings


@pytest.mark.parametrize("word", [name for name in POLICIES if name not in NEED_MORE])
def test_a_policy_that_did_not_read_says_what_it_says_when_it_reads(word: str) -> None:
    assert torch.equal(says("llama", word, read_with_full("llama")), says("llama", word))


@pytest.mark.parametrize("family", ["gemma3_text", "gemma4_text", "gemma2"])
def test_so_it_is_with_sliding_layers_and_shared_keys(family: str) -> None:
    assert torch.equal(says(family, "ema", read_with_full(family)), says(family, "ema"))


def test_only_the_first_session_reads() -> None:
    readings = read_with_full("llama")
    with session("llama", "quest", readings) as opened:
        opened.read(TEXT)
        assert opened.costs()["prefill_seconds"] is None
        opened.read(TEXT[:-1])
        assert opened.costs()["prefill_seconds"] > 0


def test_what_is_kept_is_bounded() -> None:
    readings = read_with_full("llama")
    readings.limit = 1
    with session("llama", "full", readings) as opened:
        opened.read(TEXT[:100])
    assert readings.of(TEXT) is None and readings.of(TEXT[:100]) is not None
