"""With its blocks in host memory or in a file a cache gives the tokens and the logits of one in memory, bit by bit.

Whatever the policy, the model, the way of generating, and how late the blocks come. And where the slow tier fails there is
one error that says where, in time; then the cache can be closed, and nothing is left behind.
"""

import contextlib
import gc
import os
import re
import stat
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList, PreTrainedModel

import attnpred
from attnpred.errors import StoreError, TierFullError
from attnpred.hf import Attached, TieredCache
from attnpred.hf.sizes import estimate_for
from attnpred.policies import POLICIES, Policy
from attnpred.policies.tidal import TidalDecode
from attnpred.store import backing, estimate
from attnpred.store.disk import DiskTier
from attnpred.store.fake import FakeTier
from attnpred.store.host import HostTier
from attnpred.store.tiered import TieredStore
from tests.hf.support import SMALL, greedy_logits, left_padded, offloaded, separators
from tests.models import prompt, tiny_model

LONG, NEW = 100, 9  # above the 64 tokens of the budget

Run = tuple[Tensor, Tensor]
"""Tokens and logits."""


def chosen(policy: str) -> Policy[Any] | str:
    if policy == "tidal":  # whose layers by default all attend to everything in so small a model
        return TidalDecode(sparse_layer_start=0)
    return separators(policy)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("scratch")


def is_empty(folder: Path) -> bool:
    """Return whether it is, or becomes so in a second: a thread that still reads lets go of the file when it has read."""
    for _ in range(100):
        if not list(folder.iterdir()):
            return True
        time.sleep(0.01)
    return False


@pytest.fixture(autouse=True)
def nothing_is_left(folder: Path) -> Iterator[None]:
    yield
    assert is_empty(folder)


@pytest.fixture
def tiers(monkeypatch: pytest.MonkeyPatch) -> list[FakeTier]:
    """Put a `FakeTier` around every tier that holds bytes, and return all of them, the newest last."""
    made: list[FakeTier] = []

    def wrapped(kind: type[Any]) -> Callable[..., FakeTier]:
        return lambda *args: made.append(FakeTier(kind(*args))) or made[-1]  # type: ignore[func-returns-value]

    monkeypatch.setattr(backing, "HostTier", wrapped(HostTier))
    monkeypatch.setattr(backing, "DiskTier", wrapped(DiskTier))
    return made


@contextlib.contextmanager
def new_cache(policy: str, settings: attnpred.CacheConfig, family: str = "llama") -> Iterator[TieredCache]:
    """Attach a model, and give a cache for it, which is closed afterwards."""
    attached = attnpred.attach(tiny_model(family), policy=chosen(policy), config=settings)
    with attached, attached.new_cache() as cache:
        yield cache


def assert_moved(cache: TieredCache, policy: str = "predicted") -> None:
    """Or equal logits would prove nothing: blocks were fetched one by one, and fast memory does not hold all."""
    if policy in POLICIES and POLICIES[policy].evicts:  # what it has left lies in fast memory, and the rest nowhere
        assert not any(cache.stats()["total"].get(name) for name in ("bytes_fetched", "selected"))
        return
    total = cache.stats()["total"]
    is_dense = policy in POLICIES and POLICIES[policy].is_dense
    assert total["bytes_written"] > 0 and total["bytes_streamed" if is_dense else "bytes_fetched"] > 0
    for layer in cache.layers:
        if isinstance(store := getattr(layer, "store", None), TieredStore) and store.length:
            assert store.keys.shape[2] < store.length


# The same bits


@cache
def in_memory(policy: str, settings: attnpred.CacheConfig) -> Run:
    model = tiny_model("llama")
    with attnpred.attach(model, policy=chosen(policy), config=settings):
        return greedy_logits(model, prompt(2, LONG), NEW)


def assert_same(got: Run, want: Run) -> None:
    assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1])


def assert_the_same_bits(policy: str, settings: attnpred.CacheConfig, offload: str, folder: Path) -> None:
    with new_cache(policy, offloaded(settings, offload, folder)) as cache:
        got = greedy_logits(tiny_model("llama"), prompt(2, LONG), NEW, cache=cache)
        assert_moved(cache, policy)
    assert_same(got, in_memory(policy, settings))


SHARES = [(policy, share) for policy in POLICIES for share in ([None, 0.25] if policy == "predicted" else [None])]


@pytest.mark.parametrize("offload", ["cpu", "disk"])
@pytest.mark.parametrize("dense_layers", [0, 1])
@pytest.mark.parametrize("policy, late_share", SHARES)
def test_every_policy(policy: str, late_share: float | None, dense_layers: int, offload: str, folder: Path) -> None:
    settings = replace(SMALL, dense_layers=dense_layers, late_share=late_share)
    assert_the_same_bits(policy, settings, offload, folder)


OTHERS: dict[str, tuple[str, dict[str, Any]]] = {
    "a selection per query head": ("ema", {"per_query_head": True}),
    "a budget that grows with the context": ("predicted", {"budget": 0.6}),
    "true rows": ("last_step", {"calibration_interval": 3}),
    "hysteresis": ("predicted", {"hysteresis": 0.1}),
    "recovery measured": ("predicted", {"measure_recovery": True}),
    "other blocks": ("mean_key", {"block_size": 8}),
}


@pytest.mark.parametrize("other", OTHERS)
def test_other_settings(other: str, folder: Path) -> None:
    policy, changes = OTHERS[other]
    settings = replace(SMALL, **changes)
    assert_the_same_bits(policy, settings, "disk", folder)


def test_host_memory_first_and_then_a_file(folder: Path) -> None:
    """The first segment of a layer, of a megabyte, fits into host memory; those of the others do not."""
    settings = replace(offloaded(SMALL, "disk", folder), host_limit=1 << 20)
    with new_cache("ema", settings) as cache:
        got = greedy_logits(tiny_model("llama"), prompt(2, LONG), NEW, cache=cache)
        assert_moved(cache)
        used = cache.stats()["slow_bytes"]
    assert_same(got, in_memory("ema", SMALL))
    assert 0 < used["host"] <= 1 << 20 and used["disk"] > 0


def finished(out: Any) -> Run:
    return out.sequences, torch.stack(out.logits)


def generate(model: PreTrainedModel, tokens: Tensor, cache: TieredCache, **how: Any) -> Run:
    how.setdefault("attention_mask", torch.ones_like(tokens))
    how.setdefault("do_sample", False)
    out = model.generate(
        tokens, cache=cache, max_new_tokens=NEW, return_dict_in_generate=True, output_logits=True, **how
    )
    return finished(out)


def sampling(model: PreTrainedModel, cache: TieredCache) -> Run:
    torch.manual_seed(5)
    return generate(model, prompt(2, LONG), cache, do_sample=True, temperature=1.5, top_k=40)


def beams(model: PreTrainedModel, cache: TieredCache) -> Run:
    return generate(model, prompt(2, LONG), cache, num_beams=3, num_return_sequences=2)


def padded_batch(model: PreTrainedModel, cache: TieredCache) -> Run:
    tokens, mask = left_padded([prompt(1, LONG), prompt(1, 83, 1), prompt(1, 9, 2)])
    return generate(model, tokens, cache, attention_mask=mask)


def chunked_prefill(model: PreTrainedModel, cache: TieredCache) -> Run:
    return generate(model, prompt(2, LONG), cache, prefill_chunk_size=13)


def two_turns(model: PreTrainedModel, cache: TieredCache) -> Run:
    first, logits = generate(model, prompt(2, LONG), cache)
    longer, more = generate(model, torch.cat((first, prompt(2, 11, 3)), 1), cache)
    return longer, torch.cat((logits, more))


def prompt_lookup(model: PreTrainedModel, cache: TieredCache) -> Run:
    return generate(model, prompt(1, 25).repeat(1, 4), cache, prompt_lookup_num_tokens=4)


WAYS = (sampling, beams, padded_batch, chunked_prefill, two_turns, prompt_lookup)
FAMILIES = ("llama", "gemma2", "gemma3_text", "gemma4_text", "gpt_oss")


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_way_to_generate(family: str, way: Callable[..., Run], folder: Path) -> None:
    """The models have softcaps, attention sinks, sliding layers between, and layers that share keys and values."""
    runs = []
    for settings in (SMALL, offloaded(SMALL, "cpu" if family == "llama" else "disk", folder)):
        with new_cache("predicted", settings, family) as cache:
            runs.append(way(tiny_model(family), cache))
            if settings.offload:
                assert_moved(cache)
    assert_same(*runs)


# Other numbers in the slow tier


@pytest.mark.parametrize("dtype", ["int8", "fp8"])
def test_rounded_blocks_are_the_same_from_everywhere(dtype: str, folder: Path, tiers: list[FakeTier]) -> None:
    runs = []
    for offload, delay in (("cpu", 0.0), ("disk", 0.0), ("disk", 1e-3)):
        with new_cache("predicted", replace(offloaded(SMALL, offload, folder), offload_dtype=dtype)) as cache:
            tiers[-1].delay = delay
            runs.append(greedy_logits(tiny_model("llama"), prompt(2, LONG), NEW, cache=cache))
            assert_moved(cache)
    assert_same(runs[0], runs[1])
    assert_same(runs[0], runs[2])
    exact = in_memory("predicted", SMALL)[1]
    assert torch.equal(runs[0][1][0], exact[0])  # a prompt does not read what it wrote
    assert 0 < (runs[0][1][1] - exact[1]).abs().max() < 1


def test_rounded_blocks_are_the_same_whether_they_were_evicted_or_not(monkeypatch: pytest.MonkeyPatch) -> None:
    """With more slots more blocks stay where they were filled."""
    runs, few = [], estimate.slots
    for more in (0, 5):
        monkeypatch.setattr(estimate, "slots", lambda *args, more=more: few(*args) + more)
        with new_cache("predicted", replace(SMALL, offload="cpu", offload_dtype="int8")) as cache:
            runs.append(greedy_logits(tiny_model("llama"), prompt(2, LONG), 24, cache=cache))
            assert_moved(cache)
    assert_same(*runs)


# Trouble

STEPS, BEFORE = 6, 2
TIMEOUT = 0.3
Trouble = Callable[[FakeTier], object]


@torch.no_grad()
def logits(cache: TieredCache, trouble: Callable[[], object] = lambda: None) -> Tensor:
    """Return the logits of a prompt and of `STEPS` steps; `trouble` comes after `BEFORE` of them."""
    found = []
    for i, tokens in enumerate((prompt(2, LONG), *(prompt(2, 1, i) for i in range(STEPS)))):
        if i == 1 + BEFORE:
            trouble()
        found.append(tiny_model("llama")(tokens, cache=cache, use_cache=True).logits[:, -1])
    return torch.stack(found)


@cache
def untroubled() -> Tensor:
    with new_cache("quest", SMALL) as cache:
        return logits(cache)


class Troubled:
    """An attached model whose caches lie in `tiers`."""

    def __init__(self, attached: Attached, tiers: list[FakeTier]) -> None:
        self.attached, self.tiers = attached, tiers

    def run(self, trouble: Trouble) -> dict[str, Any]:
        """Have `trouble` after all was written that there was; expect the right logits, and return what was counted."""
        with self.attached.new_cache() as cache:
            assert torch.equal(logits(cache, lambda: self._begin(cache, trouble)), untroubled())
            return cache.stats()["total"]

    def fail(self, trouble: Trouble) -> str:
        """Have `trouble`; return the message of the error, which comes in time, and after which all is well again."""
        with self.attached.new_cache() as cache:
            with pytest.raises(StoreError, match=r"^[^\n]+$") as caught:
                logits(cache, lambda: self._begin(cache, trouble))
            assert time.perf_counter() - self.began < TIMEOUT + 1
            self.began = time.perf_counter()
        assert time.perf_counter() - self.began < TIMEOUT + 1  # to close it
        for tier in self.tiers:  # let the threads go
            tier.hang.set()
            tier.hang_writes.set()
        self.run(lambda tier: None)
        return str(caught.value)

    def _begin(self, cache: TieredCache, trouble: Trouble) -> None:
        assert cache.backing is not None
        cache.backing.tier.flush()
        trouble(self.tiers[-1])
        self.began = time.perf_counter()


@pytest.fixture
def troubled(offload: str, folder: Path, tiers: list[FakeTier]) -> Iterator[Troubled]:
    untroubled()
    config = replace(offloaded(SMALL, offload, folder), fetch_timeout=TIMEOUT)
    with attnpred.attach(tiny_model("llama"), policy=chosen("quest"), config=config) as attached:
        yield Troubled(attached, tiers)


EVERYWHERE = pytest.mark.parametrize("offload", ["cpu", "disk"])
IN_A_FILE = pytest.mark.parametrize("offload", ["disk"])
PLACE = r"layer \d, block \d+"


@EVERYWHERE
def test_a_slow_tier_gives_the_same_logits_later(troubled: Troubled) -> None:
    counted = troubled.run(lambda tier: setattr(tier, "delay", 5e-3))
    assert counted["exposed_wait_ms"] > (STEPS - BEFORE) * 5 and counted["retries"] == 0


def fails(times: int, tier: FakeTier) -> None:
    tier.fail_reads = [StoreError("got a broken disk")] * times


def corrupts(times: int, tier: FakeTier) -> None:
    tier.corrupt_next = times


@EVERYWHERE
@pytest.mark.parametrize("how", [fails, corrupts])
def test_what_is_wrong_once_is_read_again(how: Callable[[int, FakeTier], None], troubled: Troubled) -> None:
    assert troubled.run(partial(how, 1))["retries"] > 0


@EVERYWHERE
def test_a_read_that_hangs_is_an_error_in_time(troubled: Troubled) -> None:
    message = troubled.fail(lambda tier: tier.hang.clear())
    assert re.match(f"{PLACE} or later: got no answer from the slow tier within 0.3 s", message)


@EVERYWHERE
@pytest.mark.parametrize("how", [{"fail_reads": [StoreError("got a broken disk")] * 9999}, {"corrupt_next": 9999}])
def test_what_always_fails_is_an_error_that_says_where(how: dict[str, Any], offload: str, troubled: Troubled) -> None:
    message = troubled.fail(lambda tier: vars(tier).update(how))
    assert re.match(
        f"{PLACE}: got (a broken disk|other bytes from {'host memory' if offload == 'cpu' else '/'})", message
    )


def file_of(tier: FakeTier) -> Path:
    assert isinstance(tier.inner, DiskTier) and tier.inner.path is not None
    return tier.inner.path


@IN_A_FILE
def test_a_file_made_shorter_is_an_error_that_names_it(folder: Path, troubled: Troubled) -> None:
    message = troubled.fail(lambda tier: os.truncate(file_of(tier), 0))
    assert re.match(f"{PLACE}: got ", message) and f"{folder}/attnpred-" in message


@IN_A_FILE
def test_a_file_written_by_others_is_an_error_that_names_it(folder: Path, troubled: Troubled) -> None:
    message = troubled.fail(lambda tier: file_of(tier).write_bytes(b"Z" * file_of(tier).stat().st_size))
    assert re.match(f"{PLACE}: got other bytes from {folder}/attnpred-", message)


@IN_A_FILE
def test_a_file_that_lost_its_name_is_as_good_as_before(troubled: Troubled) -> None:
    assert troubled.run(lambda tier: file_of(tier).unlink())["bytes_fetched"] > 0


@IN_A_FILE
@pytest.mark.parametrize("how", ["hangs", "fails"])
def test_a_write_that_does_not_come_through_is_an_error(
    how: str, troubled: Troubled, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No later than when the queue is full: here at the second write."""
    monkeypatch.setattr(backing, "WRITE_QUEUE", 1)
    if how == "hangs":
        assert "still to write after 0.3 s" in troubled.fail(lambda tier: tier.hang_writes.clear())
    else:
        broken = [StoreError("got a broken disk")]
        assert "a broken disk" in troubled.fail(lambda tier: tier.fail_writes.extend(broken))


# The file


def test_the_file_is_private_and_gone_after_generate(folder: Path) -> None:
    model, modes = tiny_model("llama"), []

    def look(tokens: Tensor, scores: Tensor) -> Tensor:
        modes.append([stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()])
        return scores

    with attnpred.attach(model, policy="ema", config=offloaded(SMALL, "disk", folder)):
        greedy_logits(model, prompt(1, LONG), 4, logits_processor=LogitsProcessorList([look]))
        assert modes == [[0o600]] * 4
        assert is_empty(folder)


@pytest.mark.parametrize("first", [0, 1], ids=["the cache first", "its fork first"])
@pytest.mark.parametrize("how", ["close", "del"])
def test_the_file_goes_with_the_last_cache(how: str, first: int, folder: Path) -> None:
    model = tiny_model("llama")
    with attnpred.attach(model, policy="ema", config=offloaded(SMALL, "disk", folder)) as attached:
        caches = [attached.new_cache()]
        tokens, _ = greedy_logits(model, prompt(1, LONG), 4, cache=caches[0])
        caches.append(caches[0].fork())
        for place in (first, 0):
            assert len(list(folder.iterdir())) == 1
            greedy_logits(model, tokens, 4, cache=caches[place])
            gone = caches.pop(place)
            if how == "close":
                gone.close()
                gone.close()
            del gone
            gc.collect()
    assert is_empty(folder)


def test_the_file_goes_after_an_error_in_generate(folder: Path) -> None:
    model = tiny_model("llama")

    def stop(tokens: Tensor, scores: Tensor) -> Tensor:
        assert list(folder.iterdir())
        raise KeyError("mine")

    with attnpred.attach(model, policy="ema", config=offloaded(SMALL, "disk", folder)):
        with contextlib.suppress(KeyError):
            greedy_logits(model, prompt(1, LONG), 4, logits_processor=LogitsProcessorList([stop]))
        gc.collect()
    assert is_empty(folder)


def test_a_fork_goes_its_own_way_on_the_same_blocks(folder: Path) -> None:
    """And when it is closed, places of blocks that the other still uses are not written anew."""
    model, runs = tiny_model("llama"), []
    for settings in (SMALL, offloaded(SMALL, "disk", folder)):
        with new_cache("predicted", settings) as cache:
            first, _ = generate(model, prompt(2, LONG), cache)
            with cache.fork() as fork:
                runs.append(generate(model, torch.cat((first, prompt(2, 11, 3)), 1), fork))
            runs.append(generate(model, torch.cat((first, prompt(2, 7, 4)), 1), cache))
    assert_same(runs[0], runs[2])
    assert_same(runs[1], runs[3])


# What cannot fit


def fast_bytes(offload: str | None, tokens: int, batch: int = 1) -> int:
    settings = replace(SMALL, offload=offload)
    return estimate_for(tiny_model("llama").config, settings, POLICIES["ema"](), torch.float32, tokens, batch).fast


CALLS: dict[str, tuple[dict[str, Any], int, int]] = {
    "new tokens": ({"max_new_tokens": NEW}, LONG + NEW, 1),
    "length": ({"max_length": LONG + NEW}, LONG + NEW, 1),
    "a generation config": ({"generation_config": GenerationConfig(max_new_tokens=NEW)}, LONG + NEW, 1),
    "beams": ({"max_new_tokens": NEW, "num_beams": 3}, LONG + NEW, 3),
    "sequences": ({"max_new_tokens": NEW, "do_sample": True, "num_return_sequences": 2}, LONG + NEW, 2),
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("offload", [None, "cpu"])
def test_what_will_not_fit_is_refused_before_the_first_token(offload: str | None, call: str) -> None:
    model, tokens, seen = tiny_model("llama"), prompt(1, LONG), []
    settings, length, batch = CALLS[call]
    needed = fast_bytes(offload, length, batch)
    assert fast_bytes(offload, LONG, batch) < needed

    def look(tokens: Tensor, scores: Tensor) -> Tensor:
        seen.append(tokens.shape)
        return scores

    how = settings | {"attention_mask": torch.ones_like(tokens), "logits_processor": LogitsProcessorList([look])}
    for limit in (needed, needed - 1):
        config = replace(SMALL, offload=offload, fast_limit=limit)
        with attnpred.attach(model, policy="ema", config=config):
            if limit == needed:
                model.generate(tokens, **how)
                assert seen
                seen.clear()
            else:
                with pytest.raises(TierFullError, match=r"^got a cache of .* of fast memory, .*raise fast_limit$"):
                    model.generate(tokens, **how)
    assert not seen


def test_the_stats_of_a_model_have_the_most_that_a_cache_held(folder: Path) -> None:
    model = tiny_model("llama")
    with attnpred.attach(model, policy="ema", config=offloaded(SMALL, "disk", folder)) as attached:
        greedy_logits(model, prompt(2, LONG), 4)
        stats = attached.stats()
        with attached.new_cache() as cache:
            greedy_logits(model, prompt(1, LONG), 4, cache=cache)
            assert cache.stats()["fast_bytes"] < stats["fast_bytes"] == attached.stats()["fast_bytes"]
            assert cache.stats()["slow_bytes"] == {"disk": 3 << 20} == stats["slow_bytes"]
        attached.reset_stats()
        assert attached.stats()["fast_bytes"] == 0 and "slow_bytes" not in attached.stats()
