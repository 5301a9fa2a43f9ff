"""A token in one compiled call is the token that layer by layer gives: same tokens, same counters, same state behind it."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

import attnpred
from attnpred import telemetry
from attnpred.hf import TieredCache, cache_argument
from attnpred.hf.attaching import attach
from tests.hf.support import COVERING, SMALL, WHOLE, greedy, greedy_logits, left_padded
from tests.models import BASE, prompt

pytest.importorskip("numba")
from attnpred.hf.compiled_stack import HOOK, MASK, NO_PLAN

TOKENS = prompt(2, 100)
FAMILIES = ["llama", "mistral", "qwen2", "qwen3"]


def wide(family: str = "llama", **more: Any) -> PreTrainedModel:
    """Return a random model of `family` with heads of 16, which compiled attention needs; norms and biases are not plain."""
    torch.manual_seed(3)
    sizes = {"head_dim": 16, "hidden_size": 64, "sliding_window": None}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **(BASE | sizes | more)), dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(4.0)
            else:
                parameter.add_(0.3 * torch.randn_like(parameter))
    model.generation_config.pad_token_id, model.generation_config.eos_token_id = 0, None
    return model.eval()


@pytest.fixture(params=[1, 2])
def threads(request: pytest.FixtureRequest) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


def layer_by_layer(model: PreTrainedModel) -> None:
    """Have the layers of a packed model called one by one."""
    del vars(model.model)["forward"]


@pytest.mark.parametrize("weights", ["int8", "float"])
@pytest.mark.parametrize("settings", [COVERING, SMALL])
@pytest.mark.parametrize("family", FAMILIES)
def test_tokens_and_counters_are_those_of_single_layers(
    family: str, settings: Any, weights: str, threads: None
) -> None:
    found = []
    for is_whole in (True, False):
        model = wide(family)
        with attach(model, config=settings, weights=weights) as attached:
            if not is_whole:
                layer_by_layer(model)
            for tokens in (TOKENS[:1], TOKENS):
                found.append((*greedy_logits(model, tokens, 12), attached.stats()))
            assert attached.stats()["weights"]["tokens"] == 2 * 11 * is_whole
            assert attached.stats()["weights"]["compiled"] == 2 * 11 * 3
            assert attached.stats()["weights"]["apart"] == {}
    for (tokens, logits, stats), (others, other, counted) in zip(found[:2], found[2:], strict=True):
        assert torch.equal(tokens, others)
        assert (logits - other).abs().max() < 1e-4 * other.abs().max()
        for name in ("layers", "total", "fast_bytes"):
            assert stats[name] == counted[name]


def test_bfloat16_differs_by_its_own_rounding() -> None:
    logits = []
    for is_whole in (True, False):
        model = wide().to(torch.bfloat16)
        with attach(model, config=SMALL, weights="int8") as attached, torch.no_grad():
            if not is_whole:
                layer_by_layer(model)
            cache = attached.new_cache()
            model(TOKENS[:, :90], **cache_argument(cache))
            for place in range(90, 96):
                out = model(TOKENS[:, place : place + 1], **cache_argument(cache)).logits
            logits.append(out.float())
            assert attached.stats()["weights"]["tokens"] == 6 * is_whole
    assert (logits[0] - logits[1]).norm() < 0.03 * logits[0].norm()


def played(model: PreTrainedModel, cache: TieredCache) -> Tensor:
    """Return the logits of steps between which everything is done to a cache that can be done."""
    found = []

    def steps(cache: TieredCache, tokens: Tensor) -> None:
        for place in range(tokens.shape[1]):
            found.append(model(tokens[:, place : place + 1], **cache_argument(cache)).logits[:, -1])

    more = prompt(2, 90, seed=1)
    model(TOKENS, **cache_argument(cache))
    steps(cache, more[:, :7])
    cache.crop(-5)
    steps(cache, more[:, 7:10])
    forked = cache.fork()
    steps(cache, more[:, 10:13])
    steps(forked, more[:, 13:16])
    cache.reorder_cache(torch.tensor([1, 0]))
    steps(cache, more[:, 16:21])
    model(more[:, 21:30], **cache_argument(cache))
    steps(cache, more[:, 30:90])  # memory is outgrown
    cache.batch_select_indices(torch.tensor([1]))
    cache.batch_repeat_interleave(3)
    steps(cache, more[:1, :5].expand(3, -1))
    cache.reset()
    model(TOKENS[:1], **cache_argument(cache))
    steps(cache, more[:1, :5])
    return torch.cat(found)


def test_a_cache_may_be_changed_between_steps() -> None:
    found, model = [], wide()
    for is_whole in (True, False):
        with attach(model, config=SMALL, weights="int8") as attached, torch.no_grad():
            if not is_whole:
                layer_by_layer(model)
            found.append(played(model, attached.new_cache()))
            assert attached.stats()["weights"]["tokens"] == (7 + 3 + 6 + 5 + 60 + 5 + 5) * is_whole
    assert (found[0] - found[1]).abs().max() < 1e-4 * found[1].abs().max()


def test_either_way_goes_on_where_the_other_stopped(tmp_path: Any) -> None:
    found, model = [], wide()
    more = prompt(1, 40, seed=1)
    with attach(model, config=SMALL, weights="int8") as attached, torch.no_grad():
        stack = vars(model.model)["forward"]
        for turns in ([True, False, True, False], [False] * 4):
            cache = attached.new_cache()
            model(TOKENS[:1], **cache_argument(cache))
            for i, is_whole in enumerate(turns):
                vars(model.model)["forward"] = stack
                if not is_whole:
                    layer_by_layer(model)
                for place in range(10 * i, 10 * i + 10):
                    out = model(more[:, place : place + 1], **cache_argument(cache)).logits
                cache.save(tmp_path / "cache")
                cache = TieredCache.load(tmp_path / "cache", model)
            found.append(out)
        vars(model.model)["forward"] = stack
    assert (found[0] - found[1]).abs().max() < 1e-4 * found[1].abs().max()


def test_what_is_not_plain_goes_layer_by_layer_and_is_counted() -> None:
    model = wide()
    ids, mask = left_padded([TOKENS[:1], TOKENS[1:, :70]])
    heard: list[int] = []
    with attach(model, config=SMALL, weights="int8") as attached:
        greedy(model, ids, 4, attention_mask=mask)
        hook = model.model.layers[1].register_forward_hook(lambda *given: heard.append(1))
        greedy(model, TOKENS[:1], 4)
        hook.remove()
        hook = model.model.layers[1].mlp.register_forward_hook(lambda *given: heard.append(1))
        greedy(model, TOKENS[:1], 4)
        hook.remove()
        out: Any = greedy(model, TOKENS[:1], 4, return_dict_in_generate=True, output_hidden_states=True)
        assert len(out.hidden_states[-1]) == 4 and len(heard) == 8
        counted = attached.stats()["weights"]
        assert counted["tokens"] == 0 and counted["apart"] == {MASK: 3, HOOK: 6} and counted["hooked"] == 3
    for settings, policy, why in ((SMALL, "ema", NO_PLAN), (WHOLE, "predicted", telemetry.FITS)):
        with attach(model, config=settings, policy=policy, weights="int8") as attached:
            greedy(model, TOKENS[:1], 4)
            assert attached.stats()["weights"]["apart"] == {why: 3}


def test_the_model_is_given_back() -> None:
    model = wide()
    with attnpred.attach(model, config=SMALL, weights="int8"):
        assert "forward" in vars(model.model)
    assert "forward" not in vars(model.model)


def test_what_is_changed_between_two_texts_is_not_overlooked() -> None:
    model = wide()
    with attach(model, config=SMALL, weights="int8") as attached:
        greedy(model, TOKENS[:1], 4)
        with torch.no_grad():
            model.model.layers[1].input_layernorm.weight.mul_(2)
        greedy(model, TOKENS[:1], 4)
        counted = attached.stats()["weights"]
        assert counted["tokens"] == 3 and counted["apart"] == {HOOK: 3} and counted["hooked"] == 3


def test_what_a_step_looked_at_can_be_told() -> None:
    model, seen = wide(), []
    for is_whole in (True, False):
        with attach(model, config=SMALL, weights="int8") as attached, torch.no_grad():
            if not is_whole:
                layer_by_layer(model)
            cache = attached.new_cache()
            model(TOKENS, **cache_argument(cache))
            for token in (5, 6, 7):
                model(torch.full((2, 1), token), **cache_argument(cache))
        seen.append([(*decoder.attended, decoder.seen) for decoder in cache.decoders.values() if decoder.attended])
    for (zone, selection, maxima), (own, chosen, found) in zip(*seen, strict=True):
        assert zone == own and maxima is not None and found is not None
        order, other = selection.argsort(-1), chosen.argsort(-1)
        assert torch.equal(selection.gather(-1, order), chosen.gather(-1, other))
        assert torch.allclose(maxima.gather(-1, order), found.gather(-1, other), atol=1e-4)
