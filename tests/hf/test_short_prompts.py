"""Every policy with prompts of one or two tokens, whose sinks are not there yet, and with heads of other sizes."""

from functools import cache

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

import attnpred
from attnpred.policies import POLICIES
from tests.hf.support import COVERING, SMALL, greedy, separators
from tests.models import BASE, prompt, tiny_model

SEEING = ("mean_key", "quest", "tactic", "hip", "recycled", "predicted")
"""Policies that make something of the keys themselves, also those of a size of which no kernel is made."""


@pytest.mark.parametrize("length", [1, 2])
@pytest.mark.parametrize("policy", POLICIES)
def test_a_short_prompt(policy: str, length: int) -> None:
    model, tokens = tiny_model("llama"), prompt(2, length)
    want = greedy(model, tokens, 14)
    with attnpred.attach(model, policy=separators(policy), config=COVERING):
        assert torch.equal(greedy(model, tokens, 14), want)


@pytest.mark.parametrize("policy", POLICIES)
def test_a_short_prompt_that_grows_beyond_the_budget(policy: str) -> None:
    model = tiny_model("llama")
    with attnpred.attach(model, policy=separators(policy), config=SMALL) as attached:
        greedy(model, prompt(1, 1), 80)
    sparse = attached.stats()["total"]["sparse_steps"]
    # snapkv chooses from a prompt alone, and this one fits: whatever is decoded stays
    assert sparse == 0 if policy in ("full", "pod", "snapkv") else sparse > 0


@cache
def model_with_heads_of(dim: int) -> PreTrainedModel:
    torch.manual_seed(dim)
    config = AutoConfig.for_model("llama", **(BASE | {"head_dim": dim}))
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    model.generation_config.pad_token_id, model.generation_config.eos_token_id = 0, None
    return model


@pytest.mark.parametrize("dim", [6, 16, 24, 80])
@pytest.mark.parametrize("policy", SEEING)
def test_heads_of_any_size(policy: str, dim: int) -> None:
    model, tokens = model_with_heads_of(dim), prompt(2, 90)
    want = greedy(model, tokens, 4)
    with attnpred.attach(model, policy=separators(policy), config=COVERING):
        assert torch.equal(greedy(model, tokens, 4), want)
    with attnpred.attach(model, policy=separators(policy), config=SMALL) as attached:
        greedy(model, tokens, 4)
    assert attached.stats()["total"]["sparse_steps"] == 3 * 3
