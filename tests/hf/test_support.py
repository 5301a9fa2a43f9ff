"""Models at the edge of what can be served: exact and sparse, or refused in one line that says why."""

import copy
from types import SimpleNamespace

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PaliGemmaConfig,
    PaliGemmaForConditionalGeneration,
    T5Config,
    T5ForConditionalGeneration,
)

import attnpred
from attnpred.errors import ConfigError, UnsupportedModelError
from tests.hf.support import COVERING, SMALL, WHOLE, greedy, separators
from tests.models import BASE, FAMILIES, prompt, tiny_model

NEW, IMAGE = 8, 96


def ready(model: torch.nn.Module) -> torch.nn.Module:
    """Return `model` for tests: it never ends a text by itself."""
    model.generation_config.pad_token_id, model.generation_config.eos_token_id = 0, None  # type: ignore[union-attr]
    return model.eval()


def paligemma() -> PaliGemmaForConditionalGeneration:
    torch.manual_seed(0)
    vision = {"model_type": "siglip_vision_model", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
    vision |= {"num_attention_heads": 2, "image_size": 28, "patch_size": 14, "projection_dim": 32}
    text = BASE | {"model_type": "gemma", "num_hidden_layers": 2}
    config = PaliGemmaConfig(
        text_config=text,
        vision_config=vision,
        image_token_index=IMAGE,
        projection_dim=32,
        hidden_size=32,
        vocab_size=97,
    )
    return ready(PaliGemmaForConditionalGeneration(config))  # type: ignore[return-value]


@pytest.mark.parametrize("beams", [1, 2])
@pytest.mark.parametrize("policy", ["ema", "h2o"])
def test_a_mask_that_serves_all_rows_serves_beams(policy: str, beams: int) -> None:
    """PaliGemma's mask has one row for a batch of any size."""
    model, tokens = paligemma(), prompt(1, 90)
    tokens[tokens == IMAGE] = 5
    tokens[:, :4] = IMAGE
    pixels = torch.randn(1, 3, 28, 28, generator=torch.Generator().manual_seed(0))
    given = {"pixel_values": pixels, "token_type_ids": torch.zeros_like(tokens), "num_beams": beams}
    want = greedy(model, tokens, NEW, **given)
    for config in (WHOLE, COVERING):
        with attnpred.attach(model, policy=policy, config=config):
            assert torch.equal(greedy(model, tokens, NEW, **given), want)
    with attnpred.attach(model, policy=policy, config=SMALL) as attached:
        greedy(model, tokens, NEW, **given)
    assert attached.stats()["total"]["sparse_steps"] == 2 * (NEW - 1)


def gemma4() -> torch.nn.Module:
    settings = BASE | FAMILIES["gemma4_text"]
    settings |= {"num_global_key_value_heads": 1, "global_head_dim": 16, "attention_k_eq_v": True}
    torch.manual_seed(0)
    return ready(AutoModelForCausalLM.from_config(AutoConfig.for_model("gemma4_text", **settings), dtype=torch.float32))


@pytest.mark.parametrize("policy", ["ema", "predicted"])
def test_layers_may_differ_in_heads(policy: str) -> None:
    model, tokens = gemma4(), prompt(2, 90)
    want = greedy(model, tokens, NEW)
    for config in (WHOLE, COVERING):
        with attnpred.attach(model, policy=separators(policy), config=config):
            assert torch.equal(greedy(model, tokens, NEW), want)
    with attnpred.attach(model, policy=separators(policy), config=SMALL, fast_limit=10**8) as attached:
        greedy(model, tokens, NEW)
    assert attached.stats()["total"]["sparse_steps"] == 2 * (NEW - 1)


def test_budgets_of_heads_are_for_layers_that_have_as_many() -> None:
    with pytest.raises(ConfigError, match="got 2 head_budgets for a model of 1 or 2, expected one for each"):
        attnpred.attach(gemma4(), policy="ema", config=SMALL, head_budgets=(1.0, 2.0))


def test_a_model_with_a_cache_of_its_own_is_refused_by_name() -> None:
    sizes = {"num_hidden_layers": 2, "layer_types": ["linear_attention", "full_attention"], "num_local_experts": 2}
    config = AutoConfig.for_model("minimax", **(BASE | sizes | {"num_experts_per_tok": 1, "block_size": 16}))
    model = AutoModelForCausalLM.from_config(config)
    for serve in (lambda: attnpred.attach(model, policy="ema"), lambda: attnpred.TieredCache(config, policy="ema")):
        with pytest.raises(UnsupportedModelError, match="got minimax, which takes no cache but its own"):
            serve()


def test_an_encoder_decoder_is_refused_as_one() -> None:
    """T5 does not let its attention be replaced either, but that is not why."""
    config = T5Config(vocab_size=97, d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=4, decoder_start_token_id=0)
    with pytest.raises(UnsupportedModelError, match="got t5, an encoder-decoder model, expected a decoder-only one"):
        attnpred.attach(T5ForConditionalGeneration(config), policy="ema")


def test_a_fixed_attention_is_refused_by_name() -> None:
    config = AutoConfig.for_model("mpt", vocab_size=97, d_model=32, n_layers=1, n_heads=4, max_seq_len=64)
    with pytest.raises(UnsupportedModelError, match="got MptForCausalLM, which does not let its attention be replaced"):
        attnpred.attach(AutoModelForCausalLM.from_config(config), policy="ema")


def test_prefix_tuning_is_refused_wherever_it_sits() -> None:
    """Its keys come in a cache that replaces ours. Attached below it, nothing is known of it before it asks the cache."""
    model = copy.deepcopy(tiny_model("llama"))
    with (
        attnpred.attach(model, policy="ema", config=SMALL) as attached,
        pytest.raises(UnsupportedModelError, match="got prefix tuning of PEFT, which brings a cache of its own"),
    ):
        _ = attached.new_cache().max_cache_len
    for kind in ("PREFIX_TUNING", "PeftType.PREFIX_TUNING"):  # text of an enumeration of texts, by version of Python
        model.active_peft_config = SimpleNamespace(peft_type=kind)
        with pytest.raises(UnsupportedModelError, match="got PREFIX_TUNING of PEFT"):
            attnpred.attach(model, policy="ema", config=SMALL)
    model.active_peft_config = SimpleNamespace(peft_type="LORA")
    attnpred.attach(model, policy="ema", config=SMALL).detach()
