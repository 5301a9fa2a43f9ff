"""A fork goes on by itself: several questions about one document, whose blocks are there once."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

import attnpred
from attnpred.hf import TieredCache
from attnpred.store.tiered import TieredStore
from tests.hf.support import SMALL, offloaded
from tests.models import prompt, tiny_model

OFFLOADS = (None, "cpu", "disk")
DOCUMENT = prompt(1, 120)
QUESTIONS = ([prompt(1, 9, 1), *prompt(1, 12, 2).split(1, 1)], [prompt(1, 14, 3), *prompt(1, 12, 4).split(1, 1)])


@torch.no_grad()
def logits(model: PreTrainedModel, cache: TieredCache, *calls: Tensor) -> Tensor:
    return torch.cat([model(tokens, cache=cache, use_cache=True).logits[:, -1] for tokens in calls])


def store_of(cache: TieredCache, index: int = 1) -> TieredStore:
    store = cache.layers[index].store  # type: ignore[union-attr]
    assert isinstance(store, TieredStore)
    return store


def slow_bytes(cache: TieredCache) -> int:
    assert cache.backing is not None
    return sum(cache.backing.tier.used().values())


@pytest.mark.parametrize("offload", OFFLOADS)
@pytest.mark.parametrize("policy", ["predicted", "ema"])
def test_each_branch_equals_a_run_of_its_own(policy: str, offload: str | None, tmp_path: Path) -> None:
    model = tiny_model("llama")
    with attnpred.attach(model, policy=policy, config=offloaded(SMALL, offload, tmp_path)) as handle:
        wanted = []
        for question in QUESTIONS:
            with handle.new_cache() as cache:
                wanted.append(logits(model, cache, DOCUMENT, *prompt(1, 3, 5).split(1, 1), *question)[4:])
        assert not torch.equal(wanted[0][-1], wanted[1][-1])
        with handle.new_cache() as first:
            logits(model, first, DOCUMENT, *prompt(1, 3, 5).split(1, 1))
            with first.fork() as second:
                got: list[list[Tensor]] = [[], []]
                for calls in zip(*QUESTIONS, strict=True):  # in turn, so that one could disturb the other
                    for branch, call, found in zip((first, second), calls, got, strict=True):
                        found.append(logits(model, branch, call))
        assert all(torch.equal(torch.cat(found), want) for found, want in zip(got, wanted, strict=True))


@pytest.mark.parametrize("offload", ["cpu", "disk"])
def test_nothing_in_the_slow_tier_is_copied(offload: str, tmp_path: Path) -> None:
    model = tiny_model("llama")
    with (
        attnpred.attach(model, policy="ema", config=offloaded(SMALL, offload, tmp_path)) as handle,
        handle.new_cache() as cache,
    ):
        logits(model, cache, DOCUMENT)
        before, written = slow_bytes(cache), cache.stats()["total"]["bytes_written"]
        with cache.fork() as fork:
            logits(model, fork, *QUESTIONS[0])
            assert slow_bytes(cache) == slow_bytes(fork) == before  # its own blocks lie in what was allocated before
            assert fork.stats()["total"]["bytes_written"] - written == 3 * 2 * 5 * 4 * (8 + 8) * 4  # 21 tokens
            assert cache.stats()["total"]["bytes_written"] == written
            assert store_of(fork).sealed.ids[0, :30].equal(store_of(cache).sealed.ids[0])  # type: ignore[union-attr]


def test_without_offload_nothing_is_copied_before_the_next_token() -> None:
    model = tiny_model("llama")
    with attnpred.attach(model, policy="ema", config=SMALL) as handle:
        cache = handle.new_cache()
        logits(model, cache, DOCUMENT)
        fork = cache.fork()
        pools = [branch.layers[1].store for branch in (cache, fork)]  # type: ignore[union-attr]
        assert pools[0].keys.data_ptr() == pools[1].keys.data_ptr()
        logits(model, fork, *QUESTIONS[0][:1])
        assert pools[0].keys.data_ptr() != pools[1].keys.data_ptr()
        assert (cache.get_seq_length(), fork.get_seq_length()) == (120, 129)


@pytest.mark.parametrize("how", ["close", "del"])
@pytest.mark.parametrize("offload", OFFLOADS)
@pytest.mark.parametrize("elder", [True, False])
def test_the_end_of_one_leaves_the_other(elder: bool, offload: str | None, how: str, tmp_path: Path) -> None:
    model = tiny_model("llama")
    with attnpred.attach(model, policy="ema", config=offloaded(SMALL, offload, tmp_path)) as handle:
        with handle.new_cache() as cache:
            want = logits(model, cache, DOCUMENT, *QUESTIONS[1])[1:]
        cache = handle.new_cache()
        logits(model, cache, DOCUMENT)
        fork = cache.fork()
        gone, kept = (cache, fork) if elder else (fork, cache)
        logits(model, gone, *QUESTIONS[0])
        if how == "close":
            gone.close()
        del cache, fork, gone
        assert torch.equal(logits(model, kept, *QUESTIONS[1]), want)
        kept.close()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("how", ["close", "del", "reset", "crop"])
def test_a_fork_that_ends_gives_its_records_back(how: str) -> None:
    """Its own alone: those of the document are still in use."""
    model = tiny_model("llama")
    with attnpred.attach(model, policy="ema", config=replace(SMALL, offload="cpu")) as handle:
        cache = handle.new_cache()
        logits(model, cache, DOCUMENT)
        fork = cache.fork()
        logits(model, fork, *QUESTIONS[0])
        records = store_of(cache).sealed.records  # type: ignore[union-attr]
        assert (
            records.users[:36].tolist() == [2] * 30 + [1] * 5 + [0] and len(records.free) == records.users.numel() - 35
        )
        if how == "crop":
            fork.crop(-141)
        elif how != "del":
            getattr(fork, how)()
        del fork
        assert records.users[:36].tolist() == [1] * 30 + [0] * 6 and len(records.free) == records.users.numel() - 30


@pytest.mark.parametrize("offload", OFFLOADS)
def test_a_fork_of_a_cache_that_was_loaded_and_not_read_yet(offload: str | None, tmp_path: Path) -> None:
    model = tiny_model("llama")
    (tmp_path / "scratch").mkdir()
    settings = offloaded(SMALL, offload, tmp_path / "scratch")
    with attnpred.attach(model, policy="ema", config=settings) as handle:
        with handle.new_cache() as cache:
            logits(model, cache, DOCUMENT)
            cache.save(tmp_path / "document.kv")
            with cache.fork() as fork:
                wanted = [logits(model, one, *question) for one, question in zip((cache, fork), QUESTIONS, strict=True)]
        loaded = TieredCache.load(tmp_path / "document.kv", model, offload_dir=settings.offload_dir)
        with loaded.fork() as fork:
            assert torch.equal(logits(model, fork, *QUESTIONS[1]), wanted[1])
        assert torch.equal(logits(model, loaded, *QUESTIONS[0]), wanted[0])
        loaded.close()
    assert not list((tmp_path / "scratch").iterdir())
