"""Policies that evict, through stock `generate`: the same tokens as stock while the budget holds everything; below it the
memory is free, and nothing that is done to a cache brings a block back or mixes rows up.

With `measure_recovery` a cache keeps all keys, and the policy evicts all the same. So one that frees must give the same bits
as one that does not, whatever is done to both.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import PreTrainedModel

import attnpred
from attnpred.errors import ConfigError, StoreError
from attnpred.hf import TieredCache, cache_argument
from attnpred.policies import POLICIES, SepLLM
from attnpred.store.evicting import EvictingPool
from tests.hf.support import COVERING, SMALL, WHOLE, greedy, greedy_logits, left_padded, separators
from tests.models import prompt, tiny_model

EVICTING = [name for name in POLICIES if POLICIES[name].evicts]
LONG, NEW = 120, 24


def test_there_are_some() -> None:
    assert {"streaming", "h2o", "snapkv", "sepllm"} <= set(EVICTING)


@pytest.mark.parametrize("config", [WHOLE, COVERING], ids=["dense", "sparse"])
@pytest.mark.parametrize("policy", EVICTING)
@pytest.mark.parametrize("family", ["llama", "gpt_oss", "gemma2", "gemma4_text"])
def test_with_the_whole_budget_it_is_stock(family: str, policy: str, config: attnpred.CacheConfig) -> None:
    model = tiny_model(family)
    tokens, mask = left_padded([prompt(1, LONG), prompt(1, 77, 1)])
    stock = greedy(model, tokens, NEW, attention_mask=mask)
    with attnpred.attach(model, policy=separators(policy), config=config) as attached:
        assert torch.equal(greedy(model, tokens, NEW, attention_mask=mask), stock)
    assert (attached.stats()["total"]["sparse_steps"] > 0) == (config is COVERING)


@pytest.mark.parametrize("block", [1, 4])
@pytest.mark.parametrize("policy", EVICTING)
def test_below_it_memory_is_free_and_the_budget_holds(policy: str, block: int) -> None:
    model, config = tiny_model("llama"), replace(SMALL, block_size=block)
    with attnpred.attach(model, policy=separators(policy), config=config) as attached:
        cache, kept = attached.new_cache(), TieredCache(model.config, policy="ema", config=config)
        got = greedy(model, prompt(2, 400), NEW, cache=cache)
        greedy(model, prompt(2, 400), NEW, cache=kept)
    assert not torch.equal(got, greedy(model, prompt(2, 400), NEW)), "the budget must matter, or this proves nothing"
    for layer, decoder in zip(cache.layers, cache.decoders.values(), strict=True):
        store = layer.store
        assert isinstance(store, EvictingPool) and store.length == 400 + NEW - 1
        beyond = NEW if decoder.policy.keeps_decoded else 0
        assert decoder.pending[1].shape[2] * block <= 64 + beyond + block
        # left, an eighth of empty slots, room for new tokens; of 424
        tokens = store.held_bytes() * block // store.block_bytes() // (store.batch * store.heads)
        assert tokens <= (64 + beyond) * 9 // 8 + 64 + 3 * block
    assert cache.stats()["total"]["tokens_attended"] <= 64 + (NEW if POLICIES[policy].keeps_decoded else 0)
    assert cache.fast_bytes() < 0.6 * kept.fast_bytes()


# Whatever is done to it


def generate(model: PreTrainedModel, tokens: Tensor, cache: TieredCache, **how: Any) -> Tensor:
    how = {"attention_mask": torch.ones_like(tokens), "do_sample": False} | how
    return model.generate(tokens, cache=cache, max_new_tokens=NEW, **how)  # type: ignore[no-any-return]


def beams(model: PreTrainedModel, cache: TieredCache) -> Tensor:
    return generate(model, prompt(2, LONG), cache, num_beams=3, num_return_sequences=2)


def padded_batch(model: PreTrainedModel, cache: TieredCache) -> Tensor:
    tokens, mask = left_padded([prompt(1, LONG), prompt(1, 83, 1), prompt(1, 9, 2)])
    return generate(model, tokens, cache, attention_mask=mask)


def chunked_prefill(model: PreTrainedModel, cache: TieredCache) -> Tensor:
    return generate(model, prompt(2, LONG), cache, prefill_chunk_size=13)


def two_turns(model: PreTrainedModel, cache: TieredCache) -> Tensor:
    first = generate(model, prompt(2, LONG), cache)
    return generate(model, torch.cat((first, prompt(2, 31, 3)), 1), cache)


def prompt_lookup(model: PreTrainedModel, cache: TieredCache) -> Tensor:
    return generate(model, prompt(1, 30).repeat(1, 4), cache, prompt_lookup_num_tokens=4)


def forked(model: PreTrainedModel, cache: TieredCache) -> Tensor:
    first = generate(model, prompt(2, LONG), cache)
    other = cache.fork()
    generate(model, torch.cat((first, prompt(2, 31, 5)), 1), cache)
    return generate(model, torch.cat((first, prompt(2, 31, 3)), 1), other)


WAYS = (beams, padded_batch, chunked_prefill, two_turns, prompt_lookup, forked)


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
@pytest.mark.parametrize("policy", EVICTING)
@pytest.mark.parametrize("family", ["llama", "gpt_oss", "gemma2"])
def test_freeing_changes_no_token(family: str, policy: str, way: Callable[..., Tensor]) -> None:
    model, found = tiny_model(family), []
    with attnpred.attach(model, policy=separators(policy), config=SMALL):
        for config in (SMALL, replace(SMALL, measure_recovery=True)):
            cache = TieredCache(model.config, policy=separators(policy), config=config)
            found.append(way(model, cache))
            freed = [layer.store for layer in cache.layers if isinstance(getattr(layer, "store", None), EvictingPool)]
            assert bool(freed) != config.measure_recovery
            assert all(store.slot_of is not None for store in freed)
    assert torch.equal(*found)


def test_a_fork_is_as_if_the_other_had_never_been() -> None:
    model = tiny_model("llama")
    with attnpred.attach(model, policy="h2o", config=SMALL) as attached:
        alone = two_turns(model, attached.new_cache())
        assert torch.equal(forked(model, attached.new_cache()), alone)


OPERATIONS = st.lists(
    st.one_of(
        st.tuples(st.just("feed"), st.integers(1, 30)),
        st.tuples(st.just("feed"), st.just(1)),
        st.tuples(st.just("crop"), st.integers(0, 9)),
        st.tuples(st.just("reorder"), st.lists(st.integers(0, 5), min_size=1, max_size=3)),
        st.tuples(st.just("repeat"), st.just(2)),
        st.tuples(st.just("fork"), st.none()),
        st.tuples(st.just("save"), st.none()),
    ),
    min_size=3,
    max_size=10,
)


@pytest.mark.parametrize("policy", EVICTING)
@given(operations=OPERATIONS, first=st.integers(70, 90))
@settings(max_examples=12, deadline=None, derandomize=True)
@torch.no_grad()
def test_operations(
    policy: str, operations: list[tuple[str, Any]], first: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    model, batch = tiny_model("llama"), 2
    with attnpred.attach(model, policy=separators(policy), config=SMALL):
        pair = [
            TieredCache(model.config, policy=separators(policy), config=replace(SMALL, measure_recovery=kept))
            for kept in (False, True)
        ]
        for place, (name, argument) in enumerate([("feed", first), *operations, ("feed", 1), ("feed", 1)]):
            length = pair[0].get_seq_length()
            if name == "feed":
                tokens = prompt(batch, argument, place)
                got, want = (model(tokens, cache=cache).logits for cache in pair)
                assert torch.equal(got, want)
            elif name == "crop":
                refused = []
                for cache in pair:
                    try:
                        cache.crop(-argument)
                    except StoreError:
                        refused.append(cache)
                        assert cache.get_seq_length() == length
                assert len(refused) in (0, 2)
            elif name == "reorder":
                rows = torch.tensor(argument) % batch
                batch = len(rows)
                for cache in pair:
                    cache.reorder_cache(rows)
            elif name == "repeat" and batch <= 2:
                batch *= 2
                for cache in pair:
                    cache.batch_repeat_interleave(2)
            elif name == "fork":
                pair[0] = pair[0].fork()
            elif name == "save":
                path: Path = tmp_path_factory.mktemp("saved") / "cache.kv"
                pair[0].save(path)
                pair[0] = TieredCache.load(path, model)
                assert all(layer.store.slot_of is not None for layer in pair[0].layers)


def test_a_prompt_that_was_loaded_goes_on_and_takes_as_little(tmp_path: Path) -> None:
    model = tiny_model("llama")
    with attnpred.attach(model, policy="h2o", config=SMALL) as attached:
        cache = attached.new_cache()
        with torch.no_grad():
            model(prompt(1, 300), cache=cache)
        cache.save(tmp_path / "h2o.kv", prompt(1, 300))
        loaded = TieredCache.load(tmp_path / "h2o.kv", model)
        assert loaded.fast_bytes() == cache.fast_bytes()
        longer = torch.cat((prompt(1, 300), prompt(1, 5, 1)), 1)
        for got, want in zip(*(greedy_logits(model, longer, cache=c) for c in (loaded, cache)), strict=True):
            assert torch.equal(got, want)


def test_offload_has_nothing_left_to_move() -> None:
    """But for dense layers, whose blocks all stay."""
    model, config = tiny_model("llama"), replace(SMALL, offload="cpu", dense_layers=1)
    want = None
    for settled in (replace(config, offload=None), config):
        with attnpred.attach(model, policy="h2o", config=settled) as attached, attached.new_cache() as cache:
            got = greedy(model, prompt(1, 300), NEW, cache=cache)
            assert [isinstance(layer.store, EvictingPool) for layer in cache.layers] == [False, True, True]
        assert want is None or torch.equal(got, want)
        want = got


def test_stock_attention_over_what_is_left_is_refused() -> None:
    model = tiny_model("llama")
    with attnpred.attach(model, policy="h2o", config=SMALL) as attached:
        cache = attached.new_cache()
        greedy(model, prompt(1, LONG), 4, cache=cache)
    with pytest.raises(StoreError, match=r"attends to everything after blocks were evicted, .* attnpred.attach"):
        model(prompt(1, 1), **cache_argument(cache))


def test_a_crop_into_what_is_gone_leaves_the_cache_as_it_was() -> None:
    model = tiny_model("llama")
    with attnpred.attach(model, policy="streaming", config=SMALL) as attached:
        cache = attached.new_cache()
        tokens = greedy(model, prompt(1, LONG), 4, cache=cache)
        before = cache.fork()
        with pytest.raises(StoreError, match="got a crop to 60 tokens, expected to keep the recent window") as caught:
            cache.crop(60 - cache.get_seq_length())
        assert "\n" not in str(caught.value) and cache.get_seq_length() == LONG + 3
        assert torch.equal(*(greedy(model, tokens, 4, cache=c) for c in (cache, before)))


def test_separators_come_from_the_tokenizer_beside_the_model_and_ids_from_its_embedding(tmp_path: Path) -> None:
    model = tiny_model("llama")
    with pytest.raises(ConfigError, match=r"got policy 'sepllm' and no tokenizer at '', .* SepLLM.for_tokenizer"):
        TieredCache(model.config, policy="sepllm")
    text, tokenizer = attnpred.hf.load_model("demo")
    made = TieredCache(text.config, policy="sepllm").policy
    assert isinstance(made, SepLLM)
    marks = {tokenizer.decode([i]) for i in made.separators}
    assert {".", ","} <= marks and all(not set(mark) - set(".,?!;: \t\n") for mark in marks)
    with attnpred.attach(model, policy=separators("sepllm"), config=SMALL) as attached:
        cache, tokens = attached.new_cache(), prompt(2, 90)
        out = greedy(model, tokens, 6, cache=cache)
        kept = cache.decoders[0].memory.marks.view().flatten(1)[:, :95]
        assert torch.equal(kept.bool(), (out[:, :95] >= 3) & (out[:, :95] < 20)) and kept.any() and not kept.all()
        with pytest.raises(ConfigError, match="got a call without token ids"), torch.no_grad():
            model(inputs_embeds=torch.randn(1, 90, 32), cache=attached.new_cache())
    assert not model.get_input_embeddings()._forward_pre_hooks
