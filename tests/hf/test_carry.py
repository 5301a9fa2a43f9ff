"""A text that was read once goes on under any policy as if that policy had read it."""

from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

import attnpred
from attnpred.errors import ConfigError
from attnpred.hf import TieredCache, carry_over
from attnpred.policies import POLICIES
from tests.hf.support import SMALL, offloaded, separators
from tests.models import prompt, tiny_model

TEXT, LAST = prompt(1, 112), prompt(1, SMALL.history, 1)
QUESTION = [prompt(1, 9, 2), *prompt(1, 10, 3).split(1, 1)]
READS_ALL = ("cascading", "fastgen", "h2o", "sepllm")


@torch.no_grad()
def logits(model: PreTrainedModel, cache: TieredCache, *calls: Tensor) -> Tensor:
    return torch.cat([model(tokens, cache=cache, use_cache=True).logits[:, -1] for tokens in calls])


def read_once(model: PreTrainedModel) -> TieredCache:
    with attnpred.attach(model, policy="full", config=SMALL) as handle:
        text = handle.new_cache()
        logits(model, text, TEXT)
    return text


def assert_alike(model: PreTrainedModel, own: TieredCache, carried: TieredCache) -> None:
    """Let `own` read all of the text in one call, and `carried` the rest of it; then ask both."""
    logits(model, own, torch.cat((TEXT, LAST), 1))
    logits(model, carried, LAST)
    wanted, got = (logits(model, cache, *QUESTION) for cache in (own, carried))
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)
    for name in ("steps", "sparse_steps", "bytes_read", "calibration_bytes", "digest_bytes"):
        assert carried.stats()["total"][name] == own.stats()["total"][name]


@pytest.mark.parametrize("policy", [name for name in POLICIES if name not in READS_ALL])
def test_it_goes_on_as_if_it_had_read_the_text_itself(policy: str) -> None:
    model = tiny_model("llama")
    text = read_once(model)
    with attnpred.attach(model, policy=separators(policy), config=SMALL) as handle:
        own, carried = handle.new_cache(), handle.new_cache()
        carry_over(text, carried)
        assert_alike(model, own, carried)
    assert text.get_seq_length() == TEXT.shape[1]


@pytest.mark.parametrize("offload", ["cpu", "disk"])
@pytest.mark.parametrize("family", ["gemma3_text", "gemma4_text"])
def test_blocks_may_lie_elsewhere_and_layers_may_slide(family: str, offload: str, tmp_path: Path) -> None:
    model = tiny_model(family)
    text = read_once(model)
    settings = offloaded(SMALL, offload, tmp_path)
    with (
        attnpred.attach(model, policy="predicted", config=settings) as handle,
        handle.new_cache() as own,
        handle.new_cache() as carried,
    ):
        carry_over(text, carried)
        assert_alike(model, own, carried)


@pytest.mark.parametrize("policy", READS_ALL)
def test_a_policy_that_looks_at_every_token_is_told_to_read(policy: str) -> None:
    model = tiny_model("llama")
    text = read_once(model)
    told = r"looks at every token of a text while it is read, .*: read the text again"
    with (
        attnpred.attach(model, policy=separators(policy), config=SMALL) as handle,
        pytest.raises(ConfigError, match=told),
    ):
        carry_over(text, handle.new_cache())


def test_what_cannot_be_carried_is_refused() -> None:
    model, other = tiny_model("llama"), tiny_model("qwen2")
    text = read_once(model)
    with attnpred.attach(model, policy="snapkv", config=SMALL) as handle:
        evicted = handle.new_cache()
        logits(model, evicted, TEXT)
        with pytest.raises(ConfigError, match="got a cache that evicts"):
            carry_over(evicted, handle.new_cache())
        with pytest.raises(ConfigError, match="got a cache of 112 tokens, expected an empty one"):
            carry_over(text, evicted)
    with (
        attnpred.attach(other, policy="full", config=SMALL) as handle,
        pytest.raises(ConfigError, match="caches of two models"),
    ):
        carry_over(text, handle.new_cache())
