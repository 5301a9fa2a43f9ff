"""A cache does what `DynamicCache` does, whatever is done to it, and a batch does what its rows do alone.

Random sequences of prompts, decode steps, crops, reorderings, selections, repetitions and resets. With a budget that
covers everything the logits must be those of a `DynamicCache`. Below the budget they must be those of caches of one row
each, which are copied where a batch is reordered: history, pending selection and counters then belong to their rows.
With its blocks in a slow tier a cache must give the same bits as one in memory.
"""

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedModel

import attnpred
from attnpred.errors import ConfigError, NotSparseError
from attnpred.hf import TieredCache, cache_argument
from attnpred.policies import Predicted
from attnpred.predictor.pretrained import Predictor, PredictorConfig
from tests.hf.support import COVERING, SMALL, offloaded
from tests.models import prompt, tiny_model

Operation = tuple[str, Any]

ROWS = st.lists(st.integers(0, 5), min_size=1, max_size=3)
OPERATIONS = st.lists(
    st.one_of(
        st.tuples(st.just("feed"), st.integers(2, 30)),
        st.tuples(st.just("step"), st.integers(1, 6)),
        st.tuples(st.just("step"), st.integers(1, 6)),
        st.tuples(st.just("crop"), st.integers(0, 30)),
        st.tuples(st.just("reorder"), ROWS),
        st.tuples(st.just("select"), ROWS),
        st.tuples(st.just("repeat"), st.integers(1, 2)),
        st.tuples(st.just("reset"), st.none()),
    ),
    min_size=3,
    max_size=9,
)
FEW = settings(max_examples=15, deadline=None, derandomize=True)
FEWER = settings(FEW, max_examples=4)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("scratch")


@pytest.fixture(params=[None, "cpu", "disk"])
def small(request: pytest.FixtureRequest, folder: Path) -> attnpred.CacheConfig:
    """Return `SMALL` for every place where blocks may lie."""
    return offloaded(SMALL, request.param, folder)


class Batch:
    """A cache of several rows, and what stands beside it."""

    def __init__(self, model: PreTrainedModel, cache: Cache) -> None:
        self.model, self.cache = model, cache

    def feed(self, tokens: Tensor) -> Tensor:
        """Return the logits after the last of `tokens` [B, T]."""
        return self.model(tokens, **cache_argument(self.cache), use_cache=True).logits[:, -1]  # type: ignore[no-any-return]

    def crop(self, count: int) -> None:
        self.cache.crop(-count)

    def reorder(self, rows: Tensor) -> None:
        self.cache.reorder_cache(rows)  # type: ignore[arg-type]

    def select(self, rows: Tensor) -> None:
        self.cache.batch_select_indices(rows)

    def repeat(self, times: int) -> None:
        self.cache.batch_repeat_interleave(times)

    def reset(self) -> None:
        self.cache.reset()


class Stock(Batch):
    """The same with a `DynamicCache`, which the oldest transformers cannot reset."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__(model, DynamicCache(config=model.config))

    def reset(self) -> None:
        self.cache = DynamicCache(config=self.model.config)


class Alone(Batch):
    """The same with a cache of its own for each row."""

    def __init__(self, model: PreTrainedModel, cache: Cache, batch: int) -> None:
        super().__init__(model, cache)
        self.caches = [copy.deepcopy(cache) for _ in range(batch)]

    def feed(self, tokens: Tensor) -> Tensor:
        rows = zip(self.caches, tokens.split(1), strict=True)
        return torch.cat([Batch(self.model, cache).feed(row) for cache, row in rows])

    def crop(self, count: int) -> None:
        for cache in self.caches:
            cache.crop(-count)

    def reorder(self, rows: Tensor) -> None:
        self.caches = [copy.deepcopy(self.caches[row]) for row in rows.tolist()]

    select = reorder

    def repeat(self, times: int) -> None:
        self.reorder(torch.arange(len(self.caches)).repeat_interleave(times))

    def reset(self) -> None:
        for cache in self.caches:
            cache.reset()


@torch.no_grad()
def assert_alike(
    pair: tuple[Batch, Batch], operations: list[Operation], first: int, rtol: float = 1e-3, atol: float = 1e-4
) -> None:
    """Do the same to both, and compare all logits; both begin with a prompt of `first` tokens."""
    batch, length, place = 2, 0, 0
    for name, argument in [("feed", first), *operations, ("step", 3)]:
        if name in ("feed", "step"):
            count = first if length == 0 else argument
            for size in [count] if name == "feed" or length == 0 else [1] * count:
                tokens = prompt(batch, size, place := place + 1)
                got, want = (side.feed(tokens) for side in pair)
                torch.testing.assert_close(got, want, rtol=rtol, atol=atol)
                length += size
        elif name == "crop":
            count = min(argument, length - 1) if length else 0
            length -= count
            for side in pair:
                side.crop(count)
        elif name in ("reorder", "select") and length:
            rows = torch.tensor(argument) % batch
            batch = len(rows)
            for side in pair:
                getattr(side, name)(rows)
        elif name == "repeat" and length and batch * argument <= 4:
            batch *= argument
            for side in pair:
                side.repeat(argument)
        elif name == "reset":
            length = 0
            for side in pair:
                side.reset()
        assert pair[0].cache.get_seq_length() == length


@given(operations=OPERATIONS, first=st.integers(1, 30))
@FEW
def test_over_everything_it_equals_a_dynamic_cache(operations: list[Operation], first: int) -> None:
    model = tiny_model("llama")
    with attnpred.attach(model, policy=Predicted(), config=COVERING) as attached:
        cache = attached.new_cache()
        # Stock attention functions know nothing of the cache, so an attached model may run both.
        assert_alike((Batch(model, cache), Stock(model)), operations, first)
    layer = cache.stats()["layers"][0]
    assert layer["sparse_steps"] == layer["steps"] >= 2


@pytest.mark.parametrize("policy", ["ema", "oracle", "predicted"])
@given(operations=OPERATIONS, first=st.integers(70, 90))
@FEW
def test_below_the_budget_a_batch_equals_its_rows(policy: str, operations: list[Operation], first: int) -> None:
    model = tiny_model("llama")
    with attnpred.attach(model, policy=policy, config=SMALL) as attached:
        cache = attached.new_cache()
        assert_alike((Batch(model, cache), Alone(model, attached.new_cache(), 2)), operations, first)


@pytest.mark.parametrize("alone", [False, True], ids=["together", "alone"])
@pytest.mark.parametrize("offload", ["cpu", "disk"])
@pytest.mark.parametrize("policy", ["ema", "oracle", "predicted"])
@given(operations=OPERATIONS, first=st.integers(70, 90))
@FEWER
def test_with_a_slow_tier_it_equals_one_without(
    policy: str, offload: str, alone: bool, folder: Path, operations: list[Operation], first: int
) -> None:
    """In all bits. Rows alone are forks, which share blocks in the tier; with others they differ by rounding errors."""
    model, how = tiny_model("llama"), {"policy": policy, "predictor": None}
    stock = attnpred.TieredCache(model.config, config=SMALL, **how)
    with attnpred.attach(model, config=offloaded(SMALL, offload, folder), **how) as attached:
        cache = attached.new_cache()
        if alone:
            assert_alike((Batch(model, stock), Alone(model, cache, 2)), operations, first)
        else:
            assert_alike((Batch(model, stock), Batch(model, cache)), operations, first, rtol=0, atol=0)
            assert cache.stats()["total"]["bytes_written"] > 0


@torch.no_grad()
def logits_of(model: PreTrainedModel, cache: Cache, *calls: Tensor) -> list[Tensor]:
    return [Batch(model, cache).feed(tokens) for tokens in calls]


def test_the_rows_of_a_batch_differ_below_the_budget() -> None:
    """Or the test above would not notice rows that are mixed up."""
    model = tiny_model("llama")
    with attnpred.attach(model, policy="ema", config=SMALL) as attached:
        cache = attached.new_cache()
        logits_of(model, cache, prompt(2, 90), *(prompt(2, 1, i) for i in range(3)))
        selection = cache.decoders[1].pending[1].sort(-1).values  # type: ignore[index]
        row = cache.decoders[1].memory.row.view()
    assert not torch.equal(selection[0], selection[1])
    assert not torch.allclose(row[0], row[1], atol=1e-2)


def test_a_reset_cache_is_as_good_as_new(small: attnpred.CacheConfig) -> None:
    model, calls = tiny_model("llama"), [prompt(1, 80), *(prompt(1, 1, i) for i in range(4))]
    with attnpred.attach(model, policy="ema", config=small) as attached:
        cache = attached.new_cache()
        logits_of(model, cache, prompt(2, 95, 9), prompt(2, 1, 9))
        cache.reset()
        assert cache.get_seq_length() == 0
        again = logits_of(model, cache, *calls)
        assert all(map(torch.equal, again, logits_of(model, attached.new_cache(), *calls)))


def test_a_copy_goes_its_own_way(small: attnpred.CacheConfig) -> None:
    """The documented way to use one prompt's cache for several continuations."""
    model, steps = tiny_model("llama"), [prompt(1, 1, i) for i in range(4)]
    with attnpred.attach(model, policy="ema", config=small) as attached:
        cache = attached.new_cache()
        logits_of(model, cache, prompt(1, 80))
        copied = copy.deepcopy(cache)
        mine = logits_of(model, copied, *steps)
        assert cache.get_seq_length() == 80 and copied.get_seq_length() == 84
        assert all(map(torch.equal, mine, logits_of(model, cache, *steps)))
        assert copied.policy is cache.policy
    # Made while the model was attached, the copy must notice that it no longer is.
    if small.offload:
        with pytest.raises(NotSparseError, match="got a model that is not attached"):
            logits_of(model, copied, *steps)
    else:
        logits_of(model, copied, *steps)
        assert copied.stats()["total"]["fallbacks"] == 12


def test_a_crop_to_before_the_beginning_empties_the_cache(small: attnpred.CacheConfig) -> None:
    model = tiny_model("llama")
    with attnpred.attach(model, policy="ema", config=small) as attached:
        cache = attached.new_cache()
        logits_of(model, cache, prompt(1, 80))
        cache.crop(-81)
        assert cache.get_seq_length() == 0
        again = logits_of(model, cache, prompt(1, 70), prompt(1, 1))
        torch.testing.assert_close(again, logits_of(model, attached.new_cache(), prompt(1, 70), prompt(1, 1)))


def test_a_crop_forgets_what_was_seen_of_the_removed_blocks(small: attnpred.CacheConfig) -> None:
    """A block that is filled again with other tokens must not be forecast by what the old ones were worth."""
    model = tiny_model("llama")
    network = Predictor(PredictorConfig("cnn", block_size=4))
    with attnpred.attach(model, config=replace(small, history=32), predictor=network) as attached:
        cache = attached.new_cache()
        logits_of(model, cache, prompt(2, 96), *(prompt(2, 1, i) for i in range(2)))
        cache.crop(-18)
        logits_of(model, cache, prompt(2, 1, 9))
        for _ in range(3):
            logits_of(model, cache, prompt(2, 4, 9))
    rows = cache.decoders[0].memory.ordered()
    assert rows.shape[3] == 24 and rows[:, :, :-13, :20].any()
    assert not rows[:, :, :-13, 20:].any()


def test_a_crop_to_a_length_is_refused() -> None:
    cache = TieredCache(tiny_model("llama").config, policy="ema", config=SMALL)
    with pytest.raises(ConfigError, match=r"got crop\(3\), expected 0 or less"):
        cache.crop(3)


def test_a_prompt_in_pieces_is_a_prompt(small: attnpred.CacheConfig) -> None:
    """Chunked prefill below the budget: the same logits, and a history seeded by the same last queries."""
    model, tokens, steps = tiny_model("llama"), prompt(2, 96), [prompt(2, 1, i) for i in range(6)]
    settings = replace(small, history=8)
    with attnpred.attach(model, policy="last_step", config=settings) as attached:
        whole = logits_of(model, attached.new_cache(), tokens, *steps)
        pieces = logits_of(model, attached.new_cache(), *tokens.split(40, 1), *steps)[2:]
    torch.testing.assert_close(pieces, whole, rtol=1e-3, atol=1e-4)


def test_a_layer_keeps_no_second_copy_of_its_keys(small: attnpred.CacheConfig) -> None:
    """What `update` returned is needed for as long as the attention function runs, not for the rest of the prompt."""
    model = tiny_model("llama")
    with attnpred.attach(model, policy="ema", config=small) as attached:
        cache = attached.new_cache()
        logits_of(model, cache, prompt(1, 80))
    assert all(layer.returned is not None and layer.returned[0]() is None for layer in cache.layers)


def test_a_cache_says_that_it_cannot_be_offloaded_by_transformers() -> None:
    cache = TieredCache(tiny_model("llama").config, policy="ema", config=SMALL)
    with pytest.raises(ConfigError, match=r"DynamicCache\(offloading=True\)"):
        cache.offload(0)
