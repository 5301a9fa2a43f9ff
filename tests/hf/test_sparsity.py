"""The sparse path reads the selected blocks and nothing else.

Proven three ways: every block outside the selection is overwritten with NaN, and nothing changes; a selected block is,
and everything becomes NaN (so the first proof can fail); all fresh memory is NaN, and the tokens stay the same.
"""

from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

import attnpred
from attnpred.hf import TieredCache
from attnpred.policies import Predicted
from tests.hf.support import COVERING, SMALL, greedy, left_padded
from tests.models import prompt, tiny_model

NO_CALIBRATION = replace(SMALL, calibration_interval=0, late_share=0)
POLICIES = ["last_step", "ema", "predicted"]
"""None that evicts: it leaves nothing outside the selection (`tests/hf/test_eviction.py`)."""


def after_prompt(model: PreTrainedModel, policy: str, settings: attnpred.CacheConfig, batch: int = 2) -> TieredCache:
    """Return a cache, of the attached `model`, that has seen a prompt of 101 tokens."""
    chosen = Predicted() if policy == "predicted" else policy
    cache = TieredCache(model.config, policy=chosen, config=settings)
    model(prompt(batch, 101), cache=cache)
    return cache


def selections(cache: TieredCache) -> dict[int, Tensor]:
    return {i: decoder.pending[1] for i, decoder in cache.decoders.items()}  # type: ignore[index]


def poison(cache: TieredCache, layer: int, outside: bool, head: int | None = None, parts: str = "kv") -> int:
    """Fill blocks of `layer` outside (or inside) its selection with NaN; return how many of them."""
    pool, selection = cache.layers[layer].store, selections(cache)[layer]
    size, count = pool.block_size, 0
    for b in range(selection.shape[0]):
        for h in range(selection.shape[1]) if head is None else [head]:
            chosen = set(selection[b, h].tolist())
            for block in range(pool.keys.shape[2] // size):
                if (block in chosen) != outside:
                    count += 1
                    for part in [pool.keys] * ("k" in parts) + [pool.values] * ("v" in parts):
                        part[b, h, block * size : (block + 1) * size] = torch.nan
    return count


def step(model: PreTrainedModel, cache: TieredCache) -> Tensor:
    return model(prompt(cache.layers[0].store.keys.shape[0], 1, 9), cache=cache).logits  # type: ignore[no-any-return]


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("family", ["llama", "gpt_oss", "gemma2", "gpt_neox"])
@torch.no_grad()
def test_blocks_outside_the_selection_are_not_read(family: str, policy: str) -> None:
    model = tiny_model(family)
    with attnpred.attach(model, policy="ema", config=NO_CALIBRATION):
        clean, poisoned = (after_prompt(model, policy, NO_CALIBRATION) for _ in range(2))
        for layer in poisoned.decoders:
            assert poison(poisoned, layer, outside=True) >= 2 * 2 * (26 - 16)
        for _ in range(3):
            want, got = step(model, clean), step(model, poisoned)
            assert got.isfinite().all() and torch.equal(got, want)
            # The forecast may have moved, to blocks that are poisoned: make these as they were in the other cache.
            for layer in poisoned.decoders:
                for name in ("keys", "values"):
                    getattr(poisoned.layers[layer].store, name).copy_(getattr(clean.layers[layer].store, name))
                poison(poisoned, layer, outside=True)
    assert all(count["sparse_steps"] == 3 for count in poisoned.stats()["layers"])


@pytest.mark.parametrize("parts", ["k", "v"])
@torch.no_grad()
def test_a_selected_block_is_read(parts: str) -> None:
    """The proof above can fail: for each layer, in each of its kv heads."""
    model = tiny_model("llama")
    with attnpred.attach(model, policy="ema", config=NO_CALIBRATION):
        for layer in range(3):
            for head in range(2):
                cache = after_prompt(model, "last_step", NO_CALIBRATION)
                assert poison(cache, layer, outside=False, head=head, parts=parts) >= 15
                assert step(model, cache).isnan().all()


@torch.no_grad()
def test_a_dense_step_reads_every_block() -> None:
    model = tiny_model("llama")
    with attnpred.attach(model, policy="ema", config=NO_CALIBRATION):
        cache = after_prompt(model, "last_step", NO_CALIBRATION)
        poison(cache, 0, outside=True)
        cache.policy = attnpred.policies.POLICIES["full"]()
        assert step(model, cache).isnan().all()


@torch.no_grad()
def test_a_calibration_row_reads_keys_and_no_values() -> None:
    """And it is the only thing that reads outside the selection: the fifth step here."""
    model, settings = tiny_model("llama"), replace(SMALL, calibration_interval=5)
    with attnpred.attach(model, policy="ema", config=settings):
        cache = after_prompt(model, "streaming", settings)
        assert cache.decoders[0].memory.rows == 0, "streaming keeps no history, so it never calibrates"
        cache = after_prompt(model, "last_step", settings)
        for steps in range(1, 6):
            pool = cache.layers[0].store
            outside = poison(cache, 0, outside=True, parts="v")
            step(model, cache)
            assert outside and cache.decoders[0].memory.row.view().isfinite().all()
            assert cache.decoders[0].counts.calibration_bytes == (pool.key_bytes() if steps == 5 else 0)
            pool.values.nan_to_num_(0.0)


@pytest.mark.parametrize("policy", ["streaming", "last_step"])
@torch.no_grad()
def test_the_memory_past_the_last_token_does_not_matter(policy: str) -> None:
    """The last block is partly filled; what lies behind its tokens (from a crop) must have no weight."""
    model = tiny_model("llama")
    with attnpred.attach(model, policy="ema", config=NO_CALIBRATION):
        clean, other = (after_prompt(model, policy, NO_CALIBRATION) for _ in range(2))
        for layer in other.decoders:
            for part in (other.layers[layer].store.keys, other.layers[layer].store.values):
                part[:, :, 102:] = 1e4
        assert torch.equal(step(model, clean), step(model, other))


@pytest.mark.parametrize("family", ["llama", "gemma2"])
@torch.no_grad()
def test_a_smaller_budget_means_fewer_bytes_and_other_logits(family: str) -> None:
    model, read = tiny_model(family), []
    for budget in (32, 64, 96):
        settings = replace(NO_CALIBRATION, budget=budget)
        with attnpred.attach(model, policy="last_step", config=settings):
            cache = after_prompt(model, "last_step", settings)
            logits = step(model, cache)
        total = cache.stats()["total"]
        read.append((total["bytes_read"], total["tokens_attended"], total["compression"], logits))
    for less, more in pairwise(read):
        assert less[0] < more[0] and less[1] < more[1] and less[2] > more[2]
        assert not torch.allclose(less[3], more[3], atol=1e-3)


@pytest.fixture
def nan_in_fresh_memory() -> Iterator[None]:
    """Let torch fill all memory that it does not initialise, in C++ as well, with NaN."""
    torch.use_deterministic_algorithms(True, warn_only=False)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("settings", [SMALL, COVERING], ids=["below", "covering"])
@pytest.mark.parametrize("family", ["llama", "gpt_oss", "gemma4_text"])
def test_no_token_depends_on_fresh_memory(
    family: str, settings: attnpred.CacheConfig, request: pytest.FixtureRequest
) -> None:
    model = tiny_model(family)
    tokens, mask = left_padded([prompt(1, 90), prompt(1, 77, 1)])

    def run() -> list[Tensor]:
        found = []
        for policy in ("ema", Predicted()):
            with attnpred.attach(model, policy=policy, config=settings):
                found.append(greedy(model, tokens, 12, attention_mask=mask))
        return found

    want = run()
    request.getfixturevalue("nan_in_fresh_memory")
    assert torch.empty(3).isnan().all() and torch.zeros(1).new_empty(3).isnan().all()
    assert all(map(torch.equal, run(), want))


def test_recovery_is_measured_beside_the_steps_and_changes_no_token() -> None:
    model = tiny_model("llama")
    with attnpred.attach(model, policy="ema", config=SMALL) as attached:
        want = greedy(model, prompt(2, 100), 12)
        assert "attention_recovery" not in attached.stats()["total"]
    shares = {}
    for policy in ("streaming", "ema", "oracle"):
        with attnpred.attach(model, policy=policy, config=SMALL, measure_recovery=True) as attached:
            got = greedy(model, prompt(2, 100), 12)
        total = attached.stats()["total"]
        shares[policy] = total["attention_recovery"], total["recovery_ratio"]
        assert 0 < total["attention_recovery"] <= 1 + 1e-6
        assert policy != "ema" or torch.equal(got, want)
    assert shares["streaming"][1] < shares["ema"][1] < shares["oracle"][1] <= 1 + 1e-6


def test_recovery_over_everything_is_one() -> None:
    model = tiny_model("llama")
    with attnpred.attach(model, policy="ema", config=COVERING, measure_recovery=True) as attached:
        greedy(model, prompt(2, 60), 8)
    total = attached.stats()["total"]
    assert total["attention_recovery"] == pytest.approx(1.0, abs=1e-5)
    assert total["recovery_ratio"] == pytest.approx(1.0, abs=1e-5)


@torch.no_grad()
def test_single_layers_stay_dense() -> None:
    """The first and the last of three; the one between is sparse, and remembers alone."""
    model, settings = tiny_model("llama"), replace(NO_CALIBRATION, dense_layers=(0, 2))
    with attnpred.attach(model, policy="last_step", config=settings):
        cache = after_prompt(model, "last_step", settings)
        step(model, cache)
    layers = cache.stats()["layers"]
    assert [layer["sparse_steps"] for layer in layers] == [0, 1, 0]
    assert [layer["dense"] for layer in layers] == [{"dense layer": 1}, {}, {"dense layer": 1}]
    assert [decoder.memory.is_empty for _, decoder in sorted(cache.decoders.items())] == [True, False, True]


def test_with_the_defaults_the_share_that_is_asked_for_is_the_share_that_is_read() -> None:
    """No layer is dense unless asked for: with two of three, a quarter would be 1.3 times less."""
    model = tiny_model("llama")
    with attnpred.attach(model, budget=0.25, policy="streaming") as attached:
        greedy(model, prompt(1, 400), 24)
        assert attached.stats()["total"]["compression"] == pytest.approx(4, rel=0.1)
