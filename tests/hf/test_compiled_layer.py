"""Compiled decoder layers say what stock ones say, and are stock again where somebody listens inside."""

import copy
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

import attnpred
from attnpred.hf import cache_argument, pack_weights
from tests.hf.support import COVERING, SMALL, greedy, greedy_logits, left_padded
from tests.models import prompt, tiny_model

pytest.importorskip("numba")
TOKENS = prompt(2, 100)
FAMILIES = ["llama", "mistral", "mistral-sliding", "qwen2", "qwen3", "gemma3_text"]


def fresh(family: str = "llama") -> PreTrainedModel:
    return copy.deepcopy(tiny_model(family))


def stock_layers(model: PreTrainedModel) -> None:
    """Give all decoder layers of a packed model their stock `forward` back."""
    for layer in model.model.layers:
        del vars(layer)["forward"]


@pytest.mark.parametrize("weights", ["int8", "float"])
@pytest.mark.parametrize("settings", [COVERING, SMALL])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_step_is_that_of_the_stock_layers(family: str, settings: Any, weights: str) -> None:
    ids, mask = left_padded([TOKENS[:1], TOKENS[1:, :70]])
    found = []
    for is_stock in (True, False):
        model = fresh(family)
        for name, parameter in model.named_parameters():  # or norms and biases are ones and zeros
            if parameter.ndim == 1:
                generator = torch.Generator().manual_seed(len(name))
                parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator)
        with attnpred.attach(model, policy="ema", config=settings, weights=weights) as attached:
            if is_stock:
                stock_layers(model)
            for tokens, more in ((TOKENS[:1], {}), (ids, {"attention_mask": mask}), (TOKENS[:1], {"num_beams": 3})):
                found.append(greedy_logits(model, tokens, 12, **more)[:2])
            assert (attached.stats()["weights"]["compiled"] > 0) is not is_stock
    for (tokens, logits), (others, other) in zip(found[:3], found[3:], strict=True):
        assert torch.equal(tokens, others)
        assert (logits - other).abs().max() < 2e-3 * other[other.isfinite()].abs().max()


def test_bfloat16_differs_by_its_own_rounding() -> None:
    logits = []
    for is_stock in (True, False):
        model = fresh().to(torch.bfloat16)
        with attnpred.attach(model, policy="ema", config=COVERING, weights="int8") as attached, torch.no_grad():
            if is_stock:
                stock_layers(model)
            cache = attached.new_cache()
            model(TOKENS[:, :50], **cache_argument(cache))
            logits.append(model(TOKENS[:, 50:51], **cache_argument(cache)).logits.float())
    assert (logits[0] - logits[1]).norm() < 0.02 * logits[0].norm()


@pytest.mark.parametrize("part", ["self_attn", "mlp", "input_layernorm", "mlp.act_fn", "self_attn.q_proj"])
def test_a_hook_inside_turns_its_layer_to_stock_and_is_counted(part: str) -> None:
    model, heard = fresh(), []
    with attnpred.attach(model, policy="ema", config=SMALL, weights="int8") as attached:
        wanted = greedy(model, TOKENS[:1], 6)
        layer = model.model.layers[1]
        hook = layer.get_submodule(part).register_forward_hook(lambda *given: heard.append(1))
        before = attached.stats()["weights"]
        assert torch.equal(greedy(model, TOKENS[:1], 6), wanted)
        counted = attached.stats()["weights"]
        assert len(heard) == 6 and counted["hooked"] - before["hooked"] == 5
        assert counted["compiled"] - before["compiled"] == 2 * 5
        hook.remove()
        greedy(model, TOKENS[:1], 6)
        assert attached.stats()["weights"]["hooked"] == counted["hooked"] and len(heard) == 6


def test_a_hook_on_a_layer_hears_every_step_and_hidden_states_come_out() -> None:
    model, heard = fresh(), []
    with attnpred.attach(model, policy="ema", config=SMALL, weights="int8") as attached:
        model.model.layers[0].register_forward_hook(lambda module, args, out: heard.append(out.shape[1]))
        out: Any = greedy(model, TOKENS[:1], 5, return_dict_in_generate=True, output_hidden_states=True)
        assert heard == [100, 1, 1, 1, 1] and len(out.hidden_states[-1]) == 4
        assert attached.stats()["weights"]["compiled"] == 3 * 4


def test_what_is_changed_inside_is_not_overlooked() -> None:
    model = fresh()
    with pack_weights(model, "int8"):
        compiled = model.model.layers[0].forward
        assert compiled.is_free()
        with torch.no_grad():
            model.model.layers[0].input_layernorm.weight.mul_(2)
        assert not compiled.is_free()
    other = fresh()
    with pack_weights(other, "int8"):
        other.model.layers[0].mlp = copy.deepcopy(other.model.layers[0].mlp)
        assert not other.model.layers[0].forward.is_free()


def test_other_caches_and_other_families_stay_stock() -> None:
    model = fresh()
    with attnpred.attach(model, policy="ema", config=SMALL, weights="int8") as attached:
        greedy(model, TOKENS[:1], 4, use_cache=False)
        assert attached.stats()["weights"]["compiled"] == 0
    other = fresh("gemma2")
    with attnpred.attach(other, policy="ema", config=SMALL, weights="int8") as attached:
        greedy(other, TOKENS[:1], 4)
        assert attached.stats()["weights"]["compiled"] == 0
