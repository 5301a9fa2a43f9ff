"""`attach` changes what it says and nothing else, gives it all back, and refuses what cannot be served, by name.

A call that cannot be sparse (another cache, no cache, an unattached model) is still right; it says so once in the log,
and is an error under `strict`.
"""

import copy
import gc
import logging
import threading
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    DynamicCache,
    GenerationConfig,
    PreTrainedModel,
)

import attnpred
from attnpred.errors import ConfigError, NotSparseError, PredictorError, UnsupportedModelError
from attnpred.hf import IMPLEMENTATION, TieredCache
from attnpred.hf.argument import NAME, NAMES
from attnpred.policies import Ema, Predicted
from attnpred.policies.paper_cnn import PaperForecast
from attnpred.predictor.pretrained import Predictor, PredictorConfig
from attnpred.telemetry import NOT_ATTACHED
from tests.hf.support import COVERING, SMALL, greedy
from tests.models import BASE, prompt, tiny_model

TOKENS = prompt(2, 100)


@pytest.fixture
def model() -> PreTrainedModel:
    return tiny_model("llama")


@pytest.fixture
def stock(model: PreTrainedModel) -> Tensor:
    return greedy(model, TOKENS, 8)


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture) -> Callable[[], list[str]]:
    """Return a function that returns the warnings so far."""
    caplog.set_level(logging.WARNING, "attnpred")
    return lambda: [record.getMessage() for record in caplog.records if record.name == "attnpred"]


def state(model: PreTrainedModel) -> tuple[Any, ...]:
    return model.config._attn_implementation, "generate" in vars(model), model.generate.__func__, sorted(vars(model))


# Attaching and giving back


def test_the_context_manager_gives_the_model_back(model: PreTrainedModel, stock: Tensor) -> None:
    before = state(model)
    with attnpred.attach(model, policy="ema", config=SMALL) as attached:
        assert model.config._attn_implementation == IMPLEMENTATION
        assert not torch.equal(greedy(model, TOKENS, 8), stock), "the budget must matter, or this proves nothing"
        assert attached.stats()["total"]["sparse_steps"] > 0
    assert state(model) == before
    assert torch.equal(greedy(model, TOKENS, 8), stock)


def test_an_exception_inside_gives_the_model_back(model: PreTrainedModel) -> None:
    before = state(model)
    with pytest.raises(KeyError), attnpred.attach(model, policy="ema", config=SMALL):
        raise KeyError
    assert state(model) == before


def test_an_implementation_chosen_before_is_given_back() -> None:
    model = copy.deepcopy(tiny_model("llama"))
    model.set_attn_implementation("eager")
    with attnpred.attach(model, policy="ema"):
        pass
    assert model.config._attn_implementation == "eager"


def test_attached_for_good_until_detached_and_detaching_twice_is_no_error(
    model: PreTrainedModel, stock: Tensor
) -> None:
    before = state(model)
    attached = attnpred.attach(model, policy="ema", config=COVERING)
    assert torch.equal(greedy(model, TOKENS, 8), stock)
    attached.detach()
    attached.detach()
    assert state(model) == before
    assert attached.stats()["total"]["sparse_steps"] == 3 * 7


def test_attaching_twice_is_an_error_that_leaves_the_first_alone(model: PreTrainedModel) -> None:
    before = state(model)
    with attnpred.attach(model, policy="ema", config=SMALL) as attached:
        with pytest.raises(ConfigError, match=r"got a LlamaForCausalLM that is attached already.*detach\(\)"):
            attnpred.attach(model, policy="ema")
        greedy(model, TOKENS, 8)
        assert attached.stats()["total"]["sparse_steps"] > 0
    assert state(model) == before


def test_a_refusal_leaves_the_model_alone(model: PreTrainedModel) -> None:
    before = state(model)
    with pytest.raises(ConfigError):
        attnpred.attach(model, policy="no-such-policy")
    assert state(model) == before


def test_stats_survive_a_call_that_failed(model: PreTrainedModel) -> None:
    with attnpred.attach(model, policy="ema", config=SMALL) as attached:
        with pytest.raises(ValueError, match="max_new_tokens"):
            greedy(model, TOKENS, 0)
        greedy(model, TOKENS, 8)
        assert attached.stats()["layers"][0]["steps"] == 7


# The name of the argument that brings a cache

CALLS: dict[str, Callable[[PreTrainedModel, dict[str, Any]], Any]] = {
    "generate": lambda model, given: greedy_by(model, given),
    "call": lambda model, given: model(TOKENS, use_cache=True, **given).logits,
}


def greedy_by(model: PreTrainedModel, given: dict[str, Any]) -> Any:
    asked = {"attention_mask": torch.ones_like(TOKENS), "max_new_tokens": 4, "do_sample": False}
    return model.generate(TOKENS, **asked, **given)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("call", CALLS)
@torch.no_grad()
def test_a_cache_is_taken_by_its_new_and_its_old_name(call: str, name: str, model: PreTrainedModel) -> None:
    """Without a warning (which here is an error), whatever transformers calls it."""
    with attnpred.attach(model, policy="ema", config=SMALL, strict=True) as attached:
        cache = attached.new_cache()
        CALLS[call](model, {name: cache})
        assert cache.get_seq_length() == 100 + (3 if call == "generate" else 0)
        assert (cache.tokens is not None) == (call == "generate")
        assert len(attached.stats()["layers"]) == (3 if call == "generate" else 0)


@pytest.mark.parametrize("call", CALLS)
@torch.no_grad()
def test_a_cache_that_is_none_is_as_if_it_were_not_given(call: str, model: PreTrainedModel) -> None:
    want = CALLS[call](model, {})
    with attnpred.attach(model, policy="ema", config=COVERING):
        for name in NAMES:
            torch.testing.assert_close(CALLS[call](model, {name: None}), want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("call", CALLS)
@torch.no_grad()
def test_two_caches_are_refused(call: str, model: PreTrainedModel) -> None:
    with (
        attnpred.attach(model, policy="ema", config=SMALL) as attached,
        pytest.raises(ConfigError, match=f"got both cache and past_key_values, expected one cache: give it as {NAME}"),
    ):
        CALLS[call](model, {name: attached.new_cache() for name in NAMES})


# Calls that cannot be sparse

NOT_SPARSE: dict[str, Callable[[PreTrainedModel], dict[str, Any]]] = {
    f"{NAME} is another cache": lambda model: {"cache": DynamicCache(config=model.config)},
    "cache_implementation='static'": lambda model: {"cache_implementation": "static"},
    "use_cache=False": lambda model: {"use_cache": False},
}


@pytest.mark.parametrize("why", NOT_SPARSE)
def test_a_call_that_rules_our_cache_out_is_left_alone_with_one_warning(
    why: str, model: PreTrainedModel, stock: Tensor, said: Callable[[], list[str]]
) -> None:
    with attnpred.attach(model, policy="ema", config=SMALL) as attached:
        for _ in range(2):
            assert torch.equal(greedy(model, TOKENS, 8, **NOT_SPARSE[why](model)), stock)
        assert attached.stats()["layers"] == []
    assert said() == [f"{why}: the sparse path is off for this call"]


@pytest.mark.parametrize("why", NOT_SPARSE)
def test_a_call_that_rules_our_cache_out_is_an_error_under_strict(why: str, model: PreTrainedModel) -> None:
    with attnpred.attach(model, policy="ema", config=SMALL, strict=True):
        with pytest.raises(NotSparseError, match=f"got {why}, expected the sparse path"):
            greedy(model, TOKENS, 8, **NOT_SPARSE[why](model))
        greedy(model, TOKENS, 8)


@pytest.mark.parametrize("where", ["keyword", "second argument", "model"])
def test_a_generation_config_rules_our_cache_out_wherever_it_comes_from(
    where: str, model: PreTrainedModel, stock: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    ruling_out = GenerationConfig(cache_implementation="static", max_new_tokens=8, do_sample=False, pad_token_id=0)
    neutral = GenerationConfig(max_new_tokens=8, do_sample=False, pad_token_id=0)
    if where == "model":
        monkeypatch.setattr(model.generation_config, "cache_implementation", "static")
    mask = torch.ones_like(TOKENS)
    with attnpred.attach(model, policy="ema", config=SMALL) as attached:
        if where == "second argument":
            out = model.generate(TOKENS, ruling_out, attention_mask=mask)
        else:
            config = ruling_out if where == "keyword" else neutral
            out = model.generate(TOKENS, generation_config=config, attention_mask=mask)
        assert attached.stats()["layers"] == []
    assert torch.equal(out, stock)  # type: ignore[arg-type]


def test_the_old_default_of_gemma_checkpoints_does_not_rule_our_cache_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """`generate` ignores cache_implementation="hybrid" where it comes from the model's own generation config."""
    model = tiny_model("gemma2")
    monkeypatch.setattr(model.generation_config, "cache_implementation", "hybrid")
    with attnpred.attach(model, policy="ema", config=SMALL, strict=True) as attached:
        greedy(model, TOKENS, 8)
    assert attached.stats()["total"]["sparse_steps"] == 2 * 7


def test_a_cache_without_an_attached_model_is_right_and_dense_and_says_so_once(
    model: PreTrainedModel, stock: Tensor, said: Callable[[], list[str]]
) -> None:
    cache = TieredCache(model.config, policy="ema", config=SMALL)
    assert torch.equal(greedy(model, TOKENS, 8, cache=cache), stock)
    total = cache.stats()["total"]
    assert total["fallbacks"] == total["steps"] == 3 * 7 and total["dense"] == {NOT_ATTACHED: 3 * 7}
    assert total["bytes_read"] == total["full_bytes"] > 0
    assert [text.partition(":")[0] for text in said()] == ["the model is not attached"]


def test_a_cache_without_an_attached_model_is_an_error_under_strict(model: PreTrainedModel) -> None:
    cache = TieredCache(model.config, policy="ema", config=SMALL, strict=True)
    with pytest.raises(NotSparseError, match=r"attnpred\.attach\(model\)"):
        greedy(model, TOKENS, 8, cache=cache)


def test_a_cache_goes_on_when_its_model_is_attached_and_detached(model: PreTrainedModel) -> None:
    def turns(cache: Any, *attached: bool) -> Tensor:
        tokens = TOKENS
        for is_attached in attached:
            handle = attnpred.attach(model, policy="ema", config=COVERING) if is_attached else None
            tokens = greedy(model, torch.cat((tokens, prompt(2, 3)), 1), 5, cache=cache)
            if handle:
                handle.detach()
        return tokens

    cache = TieredCache(model.config, policy="ema", config=COVERING)
    assert torch.equal(turns(cache, False, True, False, True), turns(DynamicCache(config=model.config), *[False] * 4))
    assert cache.stats()["layers"][0]["sparse_steps"] == 8


def test_another_cache_runs_on_the_model_of_a_cache_that_was_used_unattached(model: PreTrainedModel) -> None:
    cache = TieredCache(model.config, policy="ema", config=SMALL)
    stock = greedy(model, TOKENS, 8, cache=cache)
    with attnpred.attach(model, policy="ema", config=SMALL):
        assert torch.equal(greedy(model, TOKENS, 8, cache=DynamicCache(config=model.config)), stock)


# Models that cannot be served

REFUSED: dict[str, tuple[type, dict[str, Any], str]] = {
    "t5": (
        AutoModelForSeq2SeqLM,
        {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 1, "num_heads": 4, "vocab_size": 97},
        "t5, an encoder-decoder model|T5ForConditionalGeneration, which does not let its attention be replaced",
    ),
    "deepseek_v3": (
        AutoModelForCausalLM,
        BASE
        | {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8}
        | {"num_key_value_heads": 4, "first_k_dense_replace": 3, "head_dim": 4},
        "deepseek_v3, whose cache holds latent vectors",
    ),
    "bloom": (
        AutoModelForCausalLM,
        {"hidden_size": 32, "n_layer": 1, "n_head": 4, "vocab_size": 97},
        "BloomForCausalLM, which does not let its attention be replaced",
    ),
}


def made(kind: str, auto: type, settings: dict[str, Any]) -> PreTrainedModel:
    torch.manual_seed(0)
    model = auto.from_config(AutoConfig.for_model(kind, **settings), dtype=torch.float32).eval()  # type: ignore[attr-defined]
    model.generation_config.pad_token_id = 0
    return model  # type: ignore[no-any-return]


@pytest.mark.parametrize("kind", REFUSED)
def test_a_model_that_cannot_be_served_is_refused_by_name(kind: str) -> None:
    auto, settings, message = REFUSED[kind]
    model = made(kind, auto, settings)
    before = state(model)
    with pytest.raises(UnsupportedModelError, match=f"got ({message})"):
        attnpred.attach(model, policy="ema")
    assert state(model) == before


@pytest.mark.parametrize("kind", ["t5", "deepseek_v3"])
def test_a_cache_for_a_model_that_cannot_be_served_is_refused_by_name(kind: str) -> None:
    _, settings, _ = REFUSED[kind]
    with pytest.raises(UnsupportedModelError, match=f"got {kind}"):
        TieredCache(AutoConfig.for_model(kind, **settings), policy="ema")


CHANGES_WHAT_WAS_CACHED = {
    "jetmoe": {"kv_channels": 8, "num_local_experts": 2, "num_experts_per_tok": 1},
    "diffllama": {},
}


@pytest.mark.parametrize("kind", CHANGES_WHAT_WAS_CACHED)
def test_a_model_that_attends_to_something_else_than_it_cached_is_refused_before_its_first_token(kind: str) -> None:
    """These repeat or split keys or values after the cache; its own would give other tokens without a word."""
    model = made(kind, AutoModelForCausalLM, BASE | CHANGES_WHAT_WAS_CACHED[kind])
    stock = greedy(model, TOKENS, 8)
    with attnpred.attach(model, policy="ema", config=COVERING):
        with pytest.raises(UnsupportedModelError, match=f"got {kind}, which changes keys or values"):
            greedy(model, TOKENS, 8)
        assert torch.equal(greedy(model, TOKENS, 8, cache=DynamicCache(config=model.config)), stock)


def test_a_mask_that_is_also_a_bias_is_refused(model: PreTrainedModel) -> None:
    forbid = torch.zeros(1, 1, 20, 20).masked_fill(torch.ones(20, 20).triu(1).bool(), -1e9)
    with attnpred.attach(model, policy="ema", config=SMALL) as attached, torch.no_grad():
        want = model(TOKENS[:1, :20], use_cache=False).logits
        got = model(TOKENS[:1, :20], attention_mask=forbid, cache=attached.new_cache()).logits
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
        with pytest.raises(UnsupportedModelError, match="also a bias"):
            model(TOKENS[:1, :20], attention_mask=forbid + 0.5, cache=attached.new_cache())


# Settings

WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "unknown policy": ({"policy": "tarot"}, r"got policy 'tarot', expected one of full, streaming"),
    "unknown setting": ({"bugdet": 3}, r"got setting 'bugdet', expected one of budget, block_size"),
    "budget 0": ({"budget": 0}, r"got budget=0, expected a number of tokens"),
    "budget below 0": ({"budget": -5}, r"got budget=-5, expected a number of tokens"),
    "budget NaN": ({"budget": float("nan")}, r"got budget=nan, expected a number of tokens"),
    "budget infinite": ({"budget": float("inf")}, r"got budget=inf, expected a number of tokens"),
    "budget 1.5": ({"budget": 1.5}, r"got budget=1.5, expected a share of at most 1.0"),
    "budget True": ({"budget": True}, r"got budget=True, expected a number of tokens"),
    "budget a text": ({"budget": "64"}, r"got budget='64', expected a number of tokens"),
    "budget too small": ({"budget": 79}, r"got budget=79, expected at least 80 \(16 sink \+ 32 recent"),
    "block size that does not divide": (
        {"block_size": 24},
        r"got num_sink_tokens=16, expected a multiple of block_size=24",
    ),
    "block size below 0": ({"block_size": -1}, r"got block_size=-1, expected a whole number of at least 0"),
    "history 1.5": ({"history": 1.5}, r"got history=1.5, expected a whole number of at least 1"),
    "dense layers below 0": ({"dense_layers": -1}, r"got dense_layers=-1, expected a whole number of at least 0"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_setting_is_refused_by_attach_and_by_the_cache(case: str, model: PreTrainedModel) -> None:
    settings, message = WRONG[case]
    with pytest.raises(ConfigError, match=message):
        attnpred.attach(model, **{"policy": "ema"} | settings)
    with pytest.raises(ConfigError, match=message):
        TieredCache(model.config, **{"policy": "ema"} | settings)


def test_a_predictor_for_other_blocks_is_refused(model: PreTrainedModel) -> None:
    with pytest.raises(PredictorError, match=r"got a predictor for blocks of 16, expected 4: set block_size=16"):
        attnpred.attach(model, config=SMALL, predictor=Predictor(PredictorConfig(block_size=16)))


def test_a_predictor_that_is_not_there_is_refused(model: PreTrainedModel, tmp_path: Any) -> None:
    with pytest.raises(PredictorError, match="got missing directory"):
        attnpred.attach(model, predictor=tmp_path / "nothing")


def test_predicted_needs_no_predictor_and_takes_a_published_one(model: PreTrainedModel, tmp_path: Any) -> None:
    folder = Predictor(PredictorConfig("cnn")).save_pretrained(tmp_path / "cnn")
    with attnpred.attach(model) as attached:
        assert attached.new_cache().policy == Predicted()
    with attnpred.attach(model, predictor=folder) as attached:
        assert type(attached.new_cache().policy) is PaperForecast
    with pytest.raises(ConfigError, match="got a predictor of kind 'seer-gate' for policy 'predicted', expected 'cnn'"):
        attnpred.attach(model, predictor="seer-demo")


def test_a_block_size_that_is_not_given_suits_the_policy(model: PreTrainedModel, tmp_path: Any) -> None:
    where = {"offload": "disk", "offload_dir": tmp_path}
    for policy, settings, want in (
        ("predicted", {}, 4),
        ("ema", {}, 16),
        ("predicted", where, 16),
        ("predicted", where | {"block_size": 8}, 8),
        ("quest", {"block_size": 4}, 4),
    ):
        with attnpred.attach(model, policy=policy, **settings) as attached, attached.new_cache() as cache:
            assert cache.settings.block_size == want
    with pytest.raises(ConfigError, match="got num_sink_tokens=4, expected a multiple of block_size=16"):
        attnpred.attach(model, policy="ema", num_sink_tokens=4)


def test_budget_and_overrides_go_before_the_config(model: PreTrainedModel) -> None:
    with attnpred.attach(model, 48, policy=Ema(0.5), config=SMALL, dense_layers=1) as attached:
        settings = attached.new_cache().settings
    assert (settings.budget, settings.dense_layers, settings.block_size) == (48, 1, 4)


# Threads and memory


def test_two_models_generate_in_two_threads_what_each_gives_alone() -> None:
    families = ("llama", "qwen3")
    models = {family: tiny_model(family) for family in families}
    results: dict[str, list[Tensor]] = {family: [] for family in families}
    start = threading.Barrier(2)

    def work(family: str) -> None:
        start.wait()
        for seed in range(4):
            results[family].append(greedy(models[family], prompt(1, 90, seed), 16))

    with (
        attnpred.attach(models["llama"], policy="ema", config=SMALL) as first,
        attnpred.attach(models["qwen3"], policy="predicted", config=SMALL) as second,
    ):
        alone = {family: [greedy(models[family], prompt(1, 90, seed), 16) for seed in range(4)] for family in families}
        threads = [threading.Thread(target=work, args=(family,)) for family in families]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert first.stats()["total"]["sparse_steps"] == second.stats()["total"]["sparse_steps"] == 2 * 4 * 15 * 3
    for family in families:
        assert len(results[family]) == 4 and all(map(torch.equal, results[family], alone[family]))


def test_one_model_generates_in_two_threads_what_it_gives_alone(model: PreTrainedModel) -> None:
    results: dict[int, Tensor] = {}
    with attnpred.attach(model, policy="ema", config=SMALL):
        alone = [greedy(model, prompt(1, 90, seed), 24) for seed in range(2)]
        threads = [
            threading.Thread(target=lambda seed=seed: results.update({seed: greedy(model, prompt(1, 90, seed), 24)}))
            for seed in range(2)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert all(torch.equal(results[seed], alone[seed]) for seed in range(2))


def test_a_cache_dies_with_its_last_name(model: PreTrainedModel) -> None:
    with attnpred.attach(model, policy="ema", config=SMALL) as attached:
        cache = attached.new_cache()
        greedy(model, TOKENS, 8, cache=cache)
        alive, keys = weakref.ref(cache), weakref.ref(cache.layers[0].store.keys)
        del cache
        gc.collect()
        assert alive() is None and keys() is None
        assert attached.stats()["total"]["sparse_steps"] > 0


def test_the_cache_of_a_generate_call_dies_with_the_call(
    model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[weakref.ref[TieredCache]] = []
    init = TieredCache.__init__

    def noted(self: TieredCache, *args: Any, **kwargs: Any) -> None:
        made.append(weakref.ref(self))
        init(self, *args, **kwargs)

    monkeypatch.setattr(TieredCache, "__init__", noted)
    with attnpred.attach(model, policy="ema", config=SMALL):
        greedy(model, TOKENS, 8)
        gc.collect()
        assert len(made) == 1 and made[0]() is None


def test_a_detached_model_is_not_kept_alive() -> None:
    model = copy.deepcopy(tiny_model("llama"))
    with attnpred.attach(model, policy="ema", config=SMALL):
        greedy(model, TOKENS, 4)
    alive = weakref.ref(model)
    del model
    gc.collect()
    assert alive() is None


def test_handle_and_cache_say_what_they_do() -> None:
    model = tiny_model("llama")
    what = "Ema, budget=64, block_size=4, in fast memory"
    with attnpred.attach(model, policy="ema", config=SMALL) as attached:
        assert repr(attached) == f"Attached(LlamaForCausalLM, {what})"
        cache = attached.new_cache()
        model(prompt(1, 20), cache=cache)
        assert repr(cache) == f"TieredCache({what}, 20 tokens)"
        cache.close()
        assert repr(cache) == f"TieredCache({what}, closed)"
    assert repr(attached) == f"Attached(LlamaForCausalLM, {what}, detached)"
