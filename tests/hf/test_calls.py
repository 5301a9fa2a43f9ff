"""What a call of an attached model leaves behind, where it falls back, and what it refuses: nothing in silence."""

import copy
import io
import logging
import pickle
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

import attnpred
from attnpred.capture import captured
from attnpred.errors import ConfigError, NotSparseError, UnsupportedModelError
from attnpred.hf import TieredCache, cache_argument
from attnpred.hf.call import CALL
from attnpred.policies import SepLLM
from attnpred.predictor.pretrained import Predictor, PredictorConfig
from tests.hf.support import COVERING, SMALL, greedy
from tests.models import BASE, prompt, tiny_model

TOKENS = prompt(2, 100)


@pytest.fixture
def model() -> PreTrainedModel:
    """Return a model that no other test has used: transformers leaves hooks on one, and with these none can be pickled."""
    return cast(PreTrainedModel, tiny_model.__wrapped__("llama"))


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture) -> Callable[[], list[str]]:
    """Return a function that returns the warnings so far."""
    caplog.set_level(logging.WARNING, "attnpred")
    return lambda: [record.getMessage() for record in caplog.records if record.name == "attnpred"]


# Copies


def test_a_copy_of_an_attached_model_is_a_plain_model_with_weights_of_its_own(model: PreTrainedModel) -> None:
    stock = greedy(model, TOKENS, 8)
    with attnpred.attach(model, policy="ema", config=SMALL) as attached:
        sparse = greedy(model, TOKENS, 8)
        copied = copy.deepcopy(model)
        assert torch.equal(greedy(copied, TOKENS, 8), stock) and not torch.equal(stock, sparse)
        assert copied.config._attn_implementation != "attnpred" and set(vars(copied)) == set(vars(model)) - OURS
        assert all(not part._forward_hooks and not part._forward_pre_hooks for part in copied.modules())
        with torch.no_grad():
            copied.lm_head.weight.zero_()
        assert int(greedy(copied, TOKENS, 1)[0, -1]) == 0  # its own weights, and the original's stay
        assert torch.equal(greedy(model, TOKENS, 8), sparse)
        with attnpred.attach(copied, policy="ema", config=SMALL) as other:
            greedy(copied, TOKENS, 4)
            assert other.stats()["total"]["sparse_steps"] == 3 * 3
        assert attached.stats()["total"]["sparse_steps"] == 2 * 3 * 7
    assert torch.equal(greedy(model, TOKENS, 8), stock)


OURS = {"generate", "prepare_inputs_for_generation", "__deepcopy__", "__reduce_ex__"}


def test_a_copy_of_what_holds_an_attached_model_holds_a_plain_one(model: PreTrainedModel) -> None:
    with attnpred.attach(model, policy="ema", config=SMALL):
        held = copy.deepcopy({"model": model, "again": [model]})
    assert held["model"] is held["again"][0] is not model  # type: ignore[index]
    assert not OURS & set(vars(held["model"]))


@pytest.mark.parametrize("save", [pickle.dumps, lambda model: torch.save(model, io.BytesIO())])
def test_an_attached_model_is_not_pickled(save: Callable[[Any], Any], model: PreTrainedModel) -> None:
    with attnpred.attach(model, policy="ema", config=SMALL):
        with pytest.raises(ConfigError, match="got an attached model to pickle, expected a free one: call detach"):
            save(model)
        torch.save(model.state_dict(), io.BytesIO())
    save(model)


def test_a_generate_that_was_kept_is_stock_once_the_model_is_detached(model: PreTrainedModel) -> None:
    stock = greedy(model, TOKENS, 8)
    with attnpred.attach(model, policy="ema", config=SMALL, strict=True):
        kept = model.generate
    asked = {"attention_mask": torch.ones_like(TOKENS), "do_sample": False, "max_new_tokens": 8}
    assert torch.equal(kept(TOKENS, **asked), stock)  # type: ignore[arg-type]


# Calls that use another cache than they were given


def longrope(length: int = 64) -> PreTrainedModel:
    """Return a model whose rotations change when the context outgrows `length` tokens."""
    torch.manual_seed(0)
    half = BASE["head_dim"] // 2  # type: ignore[operator]
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * half, "long_factor": [4.0] * half}
    config = AutoConfig.for_model(
        "phi3",
        **BASE | {"sliding_window": None, "original_max_position_embeddings": length},
        rope_parameters=rope | {"original_max_position_embeddings": length},
    )
    made: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.mul_(4.0 if parameter.ndim >= 2 else 1.0)
    made.generation_config.pad_token_id = 0
    made.generation_config.eos_token_id = None
    return made


@pytest.mark.parametrize("chunk", [None, 40])
def test_a_prompt_beyond_the_short_rotations_is_served(chunk: int | None) -> None:
    model, how = longrope(), {} if chunk is None else {"prefill_chunk_size": chunk}
    want = greedy(model, TOKENS, 8)
    with attnpred.attach(model, policy="ema", config=COVERING, strict=chunk is None) as attached:
        assert torch.equal(greedy(model, TOKENS, 8, **how), want) or attached.stats()["not_sparse"]
    with attnpred.attach(model, policy="ema", config=SMALL, strict=True) as attached:
        with attached.new_cache() as cache:
            greedy(model, TOKENS, 8, cache=cache)
            assert cache.get_seq_length() == 107 and cache.tokens is not None
        assert attached.stats()["total"]["sparse_steps"] == 3 * 7 and not attached.stats()["not_sparse"]


def test_a_context_that_outgrows_the_short_rotations_is_served_or_said_to_be_not(
    said: Callable[[], list[str]],
) -> None:
    """Where `generate` itself gives the model all tokens again (not at the floor version), it is served."""
    model, tokens = longrope(), prompt(1, 60)
    fed: list[int] = []
    hook = model.register_forward_pre_hook(
        lambda _, args, given: fed.append(given["input_ids"].shape[1]), with_kwargs=True
    )
    want = greedy(model, tokens, 12)
    hook.remove()
    with attnpred.attach(model, policy="ema", config=COVERING) as attached, attached.new_cache() as cache:
        assert torch.equal(greedy(model, tokens, 12, cache=cache), want)
        fallen = attached.stats()["not_sparse"]
        if 65 in fed:
            assert cache.get_seq_length() == 71 and not fallen
        else:
            assert sum(fallen.values()) == 7 and len(said()) == 1
    if 65 not in fed:
        with (
            attnpred.attach(model, policy="ema", config=COVERING, strict=True),
            pytest.raises(NotSparseError, match="got a step of generate used another cache"),
        ):
            greedy(model, tokens, 12)


def test_guidance_reads_its_other_text_with_another_cache_and_that_is_said(
    model: PreTrainedModel, said: Callable[[], list[str]]
) -> None:
    asked = {"guidance_scale": 1.5, "negative_prompt_ids": prompt(2, 101, 7)}
    want = greedy(model, TOKENS, 4, **asked)
    with attnpred.attach(model, policy="ema", config=COVERING) as attached:
        assert torch.equal(greedy(model, TOKENS, 4, **asked), want)
        assert attached.stats()["not_sparse"] == {"a step of generate used another cache": 4}
    assert said() == ["a step of generate used another cache: the sparse path is off for this call"]
    with (
        attnpred.attach(model, policy="ema", config=COVERING, strict=True),
        pytest.raises(NotSparseError, match="got a step of generate used another cache"),
    ):
        greedy(model, TOKENS, 4, **asked)


@pytest.fixture
def checkpointing() -> PreTrainedModel:
    """Return a model in training mode that computes its layers again for a gradient, and drops its cache for that."""
    model = copy.deepcopy(tiny_model("llama")).train()
    getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
    return model


UNUSED = "the model did not use its cache (gradient checkpointing in training mode does that)"


def test_a_model_that_drops_its_cache_is_counted_and_refused_under_strict(
    checkpointing: PreTrainedModel, said: Callable[[], list[str]]
) -> None:
    with attnpred.attach(checkpointing, policy="ema", config=SMALL) as attached:
        for _ in range(2):
            checkpointing(TOKENS, cache=attached.new_cache())
        assert attached.stats()["not_sparse"] == {UNUSED: 2}
    assert said() == [f"{UNUSED}: the sparse path is off for this call"]
    with (
        attnpred.attach(checkpointing, policy="ema", config=SMALL, strict=True) as attached,
        pytest.raises(NotSparseError, match="got the model did not use its cache"),
    ):
        checkpointing(TOKENS, cache=attached.new_cache())


def test_generate_with_gradient_checkpointing_gives_stock_tokens_and_is_sparse_or_counted(
    checkpointing: PreTrainedModel,
) -> None:
    """Newer transformers keep the cache where no gradient is asked for."""
    want = greedy(checkpointing, TOKENS, 4)
    with attnpred.attach(checkpointing, policy="ema", config=COVERING) as attached:
        assert torch.equal(greedy(checkpointing, TOKENS, 4), want)
        stats = attached.stats()
        assert stats["total"].get("sparse_steps", 0) == 9 or sum(stats["not_sparse"].values()) == 4


# What a call leaves behind


@pytest.mark.parametrize("earlier", ["call", "embedding alone", "call that fails", "call of the model below the head"])
@torch.no_grad()
def test_a_policy_that_reads_tokens_never_reads_those_of_an_earlier_call(earlier: str, model: PreTrainedModel) -> None:
    policy = SepLLM(tuple(range(3, 20)), most=12, neighbours=24)
    with attnpred.attach(model, policy=policy, config=SMALL) as attached:
        if earlier == "call":
            model(TOKENS, cache=attached.new_cache())
        elif earlier == "embedding alone":
            model.get_input_embeddings()(TOKENS)
        elif earlier == "call that fails":
            with pytest.raises(IndexError):
                model(torch.full_like(TOKENS, 1000), cache=attached.new_cache())
        else:
            model.base_model(TOKENS, cache=attached.new_cache())
        assert CALL.get() is None
        with pytest.raises(ConfigError, match="got a call without token ids, expected input_ids"):
            model(inputs_embeds=torch.randn(2, 100, 32), cache=attached.new_cache())
        assert CALL.get() is None
        model(TOKENS, cache=attached.new_cache())


# Weights and gradients


@pytest.mark.parametrize("where", ["call", "generate", "config"])
def test_attention_weights_are_refused(where: str, model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    with attnpred.attach(model, policy="ema", config=SMALL) as attached:
        with pytest.raises(ConfigError, match=r"got output_attentions=True, expected False: .* detach it first"):
            if where == "config":
                monkeypatch.setattr(model.config, "_output_attentions", True)
                model(TOKENS)
            elif where == "call":
                model(TOKENS, output_attentions=True)
            else:
                greedy(model, TOKENS, 4, output_attentions=True, return_dict_in_generate=True)
        assert attached.stats()["layers"] == []


@pytest.mark.parametrize("is_attached", [True, False])
@pytest.mark.parametrize("tokens", [1, 5])
def test_a_gradient_through_a_past_is_refused_and_its_numbers_are_right(
    tokens: int, is_attached: bool, model: PreTrainedModel
) -> None:
    with torch.no_grad():
        want = model(TOKENS).logits[:, -tokens:]
    handle = attnpred.attach(model, policy="ema", config=COVERING) if is_attached else None
    try:
        cache = TieredCache(model.config, policy="ema", config=COVERING)
        model(TOKENS[:, :-tokens], **cache_argument(cache))
        logits = model(TOKENS[:, -tokens:], **cache_argument(cache)).logits
        torch.testing.assert_close(logits, want, rtol=1e-4, atol=1e-4)
        with pytest.raises(UnsupportedModelError, match="got a gradient through a call with a past"):
            logits.sum().backward()
        assert not any(getattr(layer.store, "keys", logits.detach()).requires_grad for layer in cache.layers)
    finally:
        if handle is not None:
            handle.detach()
        model.zero_grad()


@pytest.mark.parametrize("cached", [True, False])
def test_the_gradient_of_a_whole_text_is_the_stock_one(cached: bool, model: PreTrainedModel) -> None:
    def gradient(**given: Any) -> Tensor:
        model.zero_grad()
        model(TOKENS, **given).logits.logsumexp(-1).sum().backward()
        found = model.model.layers[0].self_attn.k_proj.weight.grad.clone()
        model.zero_grad()
        return found  # type: ignore[no-any-return]

    want = gradient(use_cache=False)
    with attnpred.attach(model, policy="ema", config=SMALL) as attached:
        got = gradient(**({"cache": attached.new_cache()} if cached else {"use_cache": False}))
    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-4)


# Random numbers


def everything(model: PreTrainedModel, folder: Path) -> None:
    """Use all that is public once."""
    settings = replace(SMALL, block_size=16, num_sink_tokens=16, recent_window=16, offload="disk", offload_dir=folder)
    TieredCache(model.config)
    Predictor()
    for name in (None, "attention-predictor-cnn"):
        attnpred.attach(model, predictor=name).detach()
    for policy in ("predicted", "subgen", "hip", "sepllm", "h2o"):
        chosen = SepLLM(tuple(range(3, 20)), most=12, neighbours=24) if policy == "sepllm" else policy
        with attnpred.attach(model, policy=chosen, config=settings) as attached:
            greedy(model, TOKENS, 4)
            with attached.new_cache() as cache:
                greedy(model, TOKENS, 4, cache=cache)
                cache.save(folder / "a.kv")
                cache.fork().close()
            TieredCache.load(folder / "a.kv", model, policy=None if policy != "sepllm" else chosen).close()
    Predictor(PredictorConfig("cnn")).save_pretrained(folder / "cnn")
    Predictor.from_pretrained(folder / "cnn")
    captured(model, TOKENS[:1], 8)


def test_nothing_of_ours_draws_from_the_global_generators(model: PreTrainedModel, tmp_path: Path) -> None:
    numpy = pytest.importorskip("numpy")
    torch.manual_seed(1), random.seed(1), numpy.random.seed(1)
    before = torch.get_rng_state(), random.getstate(), numpy.random.get_state()[1].tolist()
    everything(model, tmp_path)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (random.getstate(), numpy.random.get_state()[1].tolist()) == before[1:]


def test_seeded_sampling_after_attaching_is_stock_sampling(model: PreTrainedModel) -> None:
    def sampled(attach: bool) -> Tensor:
        torch.manual_seed(3)
        handle = (
            attnpred.attach(model, config=replace(COVERING, block_size=16, num_sink_tokens=16, recent_window=16))
            if attach
            else None
        )
        try:
            return model.generate(TOKENS, attention_mask=torch.ones_like(TOKENS), do_sample=True, max_new_tokens=8)  # type: ignore[return-value]
        finally:
            if handle is not None:
                handle.detach()

    assert torch.equal(sampled(False), sampled(True))
