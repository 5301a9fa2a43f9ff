"""Estimates from a config alone hold for real caches: shapes of every family, memory of every kind of policy."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, PreTrainedModel
from transformers.cache_utils import DynamicCache

from attnpred.config import CacheConfig
from attnpred.errors import UnsupportedModelError
from attnpred.hf import TieredCache, attach, cache_argument, make_policy
from attnpred.hf.sizes import estimate_for, layer_shapes
from attnpred.hf.support import is_served
from attnpred.policies import POLICIES
from attnpred.policies.base import Policy
from attnpred.policies.paper_cnn import PaperForecast
from attnpred.policies.predicted import Predicted
from attnpred.policies.seer import Seer
from attnpred.predictor.pretrained import Predictor, PredictorConfig
from tests.hf.support import SMALL, predictor
from tests.models import BASE, FAMILIES, prompt, tiny_model

STEPS = 3


def run(model: PreTrainedModel, policy: Policy[Any], settings: CacheConfig, batch: int, tokens: int) -> TieredCache:
    """Return a cache that holds `tokens` tokens in each row, the last `STEPS` of them decoded one by one."""
    text = prompt(batch, tokens)
    with attach(model, policy=policy, config=settings) as attached, torch.no_grad():
        cache = attached.new_cache()
        model(text[:, :-STEPS], cache=cache)
        for i in range(tokens - STEPS, tokens):
            model(text[:, i : i + 1], cache=cache)
    return cache


CHOICES: dict[str, Any] = {
    "predicted": Predicted,
    "seer": lambda: Seer(predictor("seer-gate")),
    "cnn": lambda: PaperForecast(Predictor(PredictorConfig(kind="cnn", block_size=4)).eval()),
    **{name: POLICIES[name] for name in ("ema", "h2o", "last_step", "quest", "mean_key", "oracle", "streaming")},
}


@pytest.mark.parametrize(("batch", "tokens"), [(1, 320), (2, 203)])
@pytest.mark.parametrize("name", CHOICES)
def test_the_memory_of_a_real_run_is_what_was_estimated(name: str, batch: int, tokens: int) -> None:
    model, policy = tiny_model("llama"), CHOICES[name]()
    settings = replace(SMALL, dense_layers=1, per_query_head=tokens == 203 and name in ("ema", "quest", "predicted"))
    cache = run(model, policy, settings, batch, tokens)
    real = [decoder.memory.bytes() for _, decoder in sorted(cache.decoders.items())][1:]
    estimated = layer_shapes(model.config, settings, policy, torch.float32, tokens, batch)
    # the cnn's last score was for the next token, which may open a block
    exact = real if name != "cnn" else pytest.approx(real, rel=0.02)
    assert [shape.memory_bytes for shape in estimated[1:]] == exact
    assert estimated[0].is_dense and estimated[0].memory_bytes == 0
    assert (sum(real) > 0) == (name not in ("oracle", "streaming"))


def test_a_context_within_the_budget_is_not_remembered() -> None:
    model, policy = tiny_model("llama"), CHOICES["predicted"]()
    settings = replace(SMALL, budget=100)
    for tokens, remembered in ((100 - SMALL.history, False), (101 - SMALL.history, True)):
        cache = run(model, policy, settings, 1, tokens)
        assert (sum(decoder.memory.bytes() for decoder in cache.decoders.values()) > 0) == remembered
        assert (estimate_for(model.config, settings, policy, torch.float32, tokens).memory > 0) == remembered


def mixed_gemma() -> PreTrainedModel:
    """Return a model whose full-attention layers have other heads than the rest."""
    settings = BASE | FAMILIES["gemma4_text"] | {"global_head_dim": 16, "num_global_key_value_heads": 1}
    config = AutoConfig.for_model("gemma4_text", **settings, attention_k_eq_v=True)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


@pytest.mark.parametrize("family", [*FAMILIES, "mixed gemma"])
def test_the_full_cache_is_the_stock_one(family: str) -> None:
    model = mixed_gemma() if family == "mixed gemma" else tiny_model(family)
    stock = DynamicCache(config=model.config)
    with torch.no_grad():
        model(prompt(2, 40), **cache_argument(stock))
    full: list[Any] = [layer for layer in stock.layers if is_served(layer)]
    policy = POLICIES["ema"]()
    shapes = layer_shapes(model.config, SMALL, policy, torch.float32, 40, 2)
    found = [((2, one.kv_heads, 40, one.key_dim), (2, one.kv_heads, 40, one.value_dim)) for one in shapes]
    assert found == [(layer.keys.shape, layer.values.shape) for layer in full]
    assert all(one.group * one.kv_heads == model.config.num_attention_heads for one in shapes)
    bytes_of_all = sum(layer.keys.nbytes + layer.values.nbytes for layer in full)
    assert estimate_for(model.config, SMALL, policy, torch.float32, 40, 2).full == bytes_of_all
    assert (family == "mistral-sliding") == (not shapes)


def test_values_may_be_smaller_than_keys() -> None:
    config = LlamaConfig(**BASE, v_head_dim=4)
    shapes = layer_shapes(config, SMALL, POLICIES["ema"](), torch.bfloat16, 100)
    assert [(shape.key_dim, shape.value_dim, shape.item_bytes) for shape in shapes] == [(8, 4, 2)] * 3


def test_a_dense_policy_has_dense_layers_alone() -> None:
    shapes = layer_shapes(LlamaConfig(**BASE), SMALL, POLICIES["full"](), torch.float32, 400)
    assert [(shape.is_dense, shape.memory_bytes) for shape in shapes] == [(True, 0)] * 3


def test_the_generator_of_the_caller_is_left_alone() -> None:
    before = torch.random.get_rng_state()
    layer_shapes(LlamaConfig(**BASE), SMALL, CHOICES["quest"](), torch.float32, 400)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_an_unsupported_model_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="got llama, whose cache holds latent vectors"):
        layer_shapes(LlamaConfig(**BASE, kv_lora_rank=8), SMALL, POLICIES["ema"](), torch.float32, 400)


LLAMA_1B = LlamaConfig(
    hidden_size=2048, num_hidden_layers=16, num_attention_heads=32, num_key_value_heads=8, head_dim=64
)


@pytest.mark.parametrize(
    ("offload", "dense_layers", "tokens", "least"),
    [
        ("cpu", 2, 1 << 15, 10),
        ("disk", 2, 1 << 15, 10),
        ("disk", 2, 1 << 16, 10),
        ("disk", 0, 1 << 15, 10),
        ("disk", 2, 1 << 20, 12),
    ],
)
def test_a_long_context_takes_a_tenth_of_fast_memory(offload: str, dense_layers: int, tokens: int, least: int) -> None:
    settings = CacheConfig(budget=1 / 13, offload=offload, dense_layers=dense_layers)
    policy = make_policy("predicted", None, LLAMA_1B, settings)
    found = estimate_for(LLAMA_1B, settings, policy, torch.bfloat16, tokens)
    assert found.full == tokens * 16 * 8 * 64 * 2 * 2
    assert least <= found.full / found.fast < 13
    assert found.host + found.disk == found.full  # blocks are as they were, and whole segments
