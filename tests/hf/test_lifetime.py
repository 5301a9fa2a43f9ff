"""The end of a cache, and what ends a step halfway: every later use is right or an error, in any thread and process."""

import copy
import io
import os
import pickle
import random
import threading
import time
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import attnpred
from attnpred.errors import StoreError, TierFullError
from attnpred.hf import TieredCache, cache_argument
from attnpred.hf.attention import attention
from attnpred.hf.layer import TieredLayer
from attnpred.store import records
from tests.hf.support import SMALL, WHOLE, offloaded
from tests.hf.test_fork import logits
from tests.hf.test_pod import write
from tests.models import prompt, tiny_model

__all__ = ["write"]  # a fixture

OFFLOADS = (None, "cpu", "disk")
CLOSED = "^got a cache that was closed, expected an open one: its context is gone, make a new cache$"
DOCUMENT = prompt(1, 120)
STEPS = prompt(1, 6, 1).split(1, 1)

USES: dict[str, Callable[[TieredCache, Path], Any]] = {
    "step": lambda cache, _: logits(tiny_model("llama"), cache, STEPS[0]),
    "generate": lambda cache, _: tiny_model("llama").generate(DOCUMENT, **cache_argument(cache), max_new_tokens=2),
    "save": lambda cache, folder: cache.save(folder / "file.kv"),
    "fork": lambda cache, _: cache.fork(),
    "deepcopy": lambda cache, _: copy.deepcopy(cache),
    "copy": lambda cache, _: copy.copy(cache),
    "crop": lambda cache, _: cache.crop(-1),
    "reset": lambda cache, _: cache.reset(),
    "length": lambda cache, _: cache.get_seq_length(),
    "reorder": lambda cache, _: cache.reorder_cache(torch.tensor([0])),  # type: ignore[arg-type]
    "select": lambda cache, _: cache.batch_select_indices(torch.tensor([0])),
    "repeat": lambda cache, _: cache.batch_repeat_interleave(2),
    "layer": lambda cache, _: cache.layers[1].get_seq_length(),
    "copy of a layer": lambda cache, _: copy.deepcopy(cache.layers[1]),
    "decoder": lambda cache, _: cache.decoder(1),
    "with": lambda cache, _: cache.__enter__(),
}


@pytest.mark.parametrize("offload", OFFLOADS)
def test_every_use_of_a_closed_cache_is_an_error(offload: str | None, tmp_path: Path) -> None:
    (tmp_path / "scratch").mkdir()
    with attnpred.attach(
        tiny_model("llama"), policy="ema", config=offloaded(SMALL, offload, tmp_path / "scratch")
    ) as handle:
        cache = handle.new_cache()
        logits(tiny_model("llama"), cache, DOCUMENT, *STEPS[:2])
        before = cache.stats()
        cache.close()
        for use in USES.values():
            with pytest.raises(StoreError, match=CLOSED):
                use(cache, tmp_path)
        after = cache.stats()
        assert after["total"] == before["total"] and after["fast_bytes"] == 0 < before["fast_bytes"]
        cache.close()
    assert [path.name for path in tmp_path.rglob("*")] == ["scratch"]


def test_layers_that_share_keys_are_closed_too(write: Callable[..., str]) -> None:
    model = tiny_model("llama")
    with attnpred.attach(model, policy="pod", layer_groups=write(model), own_sinks=3, own_recent=7) as handle:
        cache = handle.new_cache()
        logits(model, cache, DOCUMENT, STEPS[0])
        sharing, held = cache.sharing, weakref.ref(cache.layers[1].store)  # type: ignore[union-attr]
        cache.close()
        assert held() is None  # the memory is free, though somebody still has what shared it
        for use in (lambda: logits(model, cache, STEPS[1]), lambda: sharing.settle(1)):  # type: ignore[union-attr]
            with pytest.raises(StoreError, match=CLOSED):
                use()


@pytest.mark.parametrize("offload", OFFLOADS)
def test_a_step_between_two_layers_is_stopped(
    offload: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Closed at each place where another thread could, also between `update` and the attention that follows."""
    model = tiny_model("llama")
    for stop in range(6):
        with attnpred.attach(model, policy="ema", config=offloaded(SMALL, offload, tmp_path)) as handle:
            cache = handle.new_cache()
            logits(model, cache, DOCUMENT, STEPS[0])
            calls = iter(range(100))

            def closing(real: Any, calls: Any = calls, stop: int = stop, mine: TieredCache = cache) -> Any:
                def call(*args: Any, **kwargs: Any) -> Any:
                    if next(calls) == stop:
                        mine.close()
                    return real(*args, **kwargs)

                return call

            with monkeypatch.context() as patch, pytest.raises(StoreError, match=CLOSED):
                patch.setattr(TieredCache, "layer_of", closing(TieredCache.layer_of))
                patch.setattr(TieredLayer, "update", closing(TieredLayer.update))
                logits(model, cache, STEPS[1])
                logits(model, cache, STEPS[2])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("offload", OFFLOADS)
def test_closing_while_another_thread_decodes_stops_it(offload: str | None, tmp_path: Path) -> None:
    """The tokens until then are right, then there is one error, soon."""
    model = tiny_model("llama")
    steps = prompt(1, 120, 3).split(1, 1)
    with attnpred.attach(model, policy="ema", config=offloaded(SMALL, offload, tmp_path)) as handle:
        with handle.new_cache() as cache:
            wanted = logits(model, cache, DOCUMENT, *steps)
        for turn in range(4):
            cache, found, errors = handle.new_cache(), list[torch.Tensor](), list[BaseException]()

            def decode(cache: TieredCache = cache, found: Any = found, errors: Any = errors) -> None:
                try:
                    for tokens in (DOCUMENT, *steps):
                        found.append(logits(model, cache, tokens))
                except BaseException as caught:
                    errors.append(caught)

            thread = threading.Thread(target=decode)
            thread.start()
            while len(found) < 3 + turn and thread.is_alive():
                time.sleep(0.0005 * turn)
            cache.close()
            thread.join(20)
            assert not thread.is_alive()
            assert [type(one) for one in errors] == [StoreError], errors
            assert torch.equal(torch.cat(found), wanted[: len(found)])
    assert not list(tmp_path.iterdir())


# A step that ended halfway


def torn(model: Any, cache: TieredCache, monkeypatch: pytest.MonkeyPatch, tokens: torch.Tensor, layer: int) -> None:
    """Begin a step with `tokens` that fails in the attention of `layer`."""

    def fail(module: Any, *args: Any, **kwargs: Any) -> Any:
        if module.layer_idx == layer:
            raise KeyboardInterrupt
        return attention(module, *args, **kwargs)

    from transformers import AttentionInterface

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setitem(AttentionInterface._global_mapping, "attnpred", fail)
        logits(model, cache, tokens)


@pytest.mark.parametrize("family", ["llama", "gemma4_text", "gemma3_text"])
@pytest.mark.parametrize("offload", OFFLOADS)
def test_a_torn_cache_is_refused_until_it_is_cut(
    family: str, offload: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model(family)
    short = DOCUMENT[:, :16]  # below the sliding windows, which cannot be cut later
    with attnpred.attach(model, policy="ema", config=offloaded(WHOLE, offload, tmp_path)) as handle:
        with handle.new_cache() as cache:
            wanted = logits(model, cache, short, *STEPS)
        cache = handle.new_cache()
        logits(model, cache, short, *STEPS[:2])
        torn(model, cache, monkeypatch, STEPS[2], 0)
        match = (
            r"^got a cache with 18 tokens in one layer and 19 in another, .* crop\(-1\) takes back what it did, or make"
        )
        for use in (lambda: logits(model, cache, STEPS[2]), lambda: cache.save(tmp_path / "x.kv")):
            with pytest.raises(StoreError, match=match):
                use()
        assert not (tmp_path / "x.kv").exists()
        cache.crop(-1)
        assert {layer.get_seq_length() for layer in cache.layers[:2]} == {18}
        assert torch.equal(logits(model, cache, *STEPS[2:]), wanted[3:])
        cache.close()


def test_a_torn_prompt_is_cut_to_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama")
    with attnpred.attach(model, policy="ema", config=SMALL) as handle:
        cache = handle.new_cache()
        wanted = logits(model, cache, DOCUMENT, *STEPS)
        cache = handle.new_cache()
        torn(model, cache, monkeypatch, DOCUMENT, 1)
        with pytest.raises(StoreError, match=r"with 0 tokens in one layer and 120 in another, .* crop\(-120\) takes"):
            logits(model, cache, DOCUMENT)
        cache.crop(0)
        assert cache.get_seq_length() == 0
        assert torch.equal(logits(model, cache, DOCUMENT, *STEPS), wanted)


@pytest.mark.parametrize("tokens", [1, 22])
def test_a_full_tier_in_the_middle_leaves_what_was_there(tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The layer whose blocks found no room is as before, and crop mends those before it."""
    monkeypatch.setattr(records, "SEGMENT_BYTES", 1)  # every block asks for room
    model = tiny_model("llama")
    with attnpred.attach(model, policy="full", config=replace(SMALL, offload="cpu")) as handle:
        calls = [DOCUMENT[:, :50], *DOCUMENT[:, 50:].split(tokens, 1)]
        with handle.new_cache() as cache:
            wanted = [logits(model, cache, call) for call in calls]
        cache, failures, chance = handle.new_cache(), set[int](), random.Random(0)
        tier: Any = cache.backing.tier  # type: ignore[union-attr]
        allocate = tier.allocate

        def sometimes(size: int) -> Any:
            if chance.random() < 0.2:
                raise TierFullError("got no room")
            return allocate(size)

        for done, call in enumerate(calls):
            if done:
                monkeypatch.setattr(tier, "allocate", sometimes)
            length = cache.get_seq_length()
            try:
                found = logits(model, cache, call)
            except TierFullError:
                failures.add(sum(layer.get_seq_length() > length for layer in cache.layers))  # type: ignore[union-attr]
                monkeypatch.setattr(tier, "allocate", allocate)
                cache.crop(length - cache.get_seq_length())
                found = logits(model, cache, call)
            assert torch.equal(found, wanted[done])
        assert failures >= {0, 1}  # layers that had the tokens already
        cache.close()


# Copies and other processes


def test_a_cache_is_not_pickled_but_copied() -> None:
    model = tiny_model("llama")
    with attnpred.attach(model, policy="ema", config=SMALL) as handle, handle.new_cache() as cache:
        logits(model, cache, DOCUMENT)
        for write in (
            pickle.dumps,
            lambda it: torch.save(it, io.BytesIO()),
            lambda it: torch.save({"a": it}, io.BytesIO()),
        ):
            with pytest.raises(
                StoreError, match=r"^got a cache to pickle, expected cache\.save\(path\): TieredCache\.load"
            ):
                write(cache)
        copied = copy.copy(cache)
        wanted = logits(model, cache.fork(), *STEPS)
        assert torch.equal(logits(model, copied, *STEPS), wanted) and cache.get_seq_length() == 120


@pytest.mark.parametrize("offload", ["cpu", "disk"])
def test_a_cache_does_not_cross_a_fork(offload: str, tmp_path: Path) -> None:
    model = tiny_model("llama")
    with attnpred.attach(model, policy="ema", config=offloaded(SMALL, offload, tmp_path)) as handle:
        cache = handle.new_cache()
        logits(model, cache, DOCUMENT, *STEPS[:3])
        reading, writing = os.pipe()
        child = os.fork()
        if not child:
            try:
                began, said = time.monotonic(), "nothing"
                try:
                    logits(model, cache, STEPS[3])
                except StoreError as error:
                    said = str(error)
                cache.close()
                os.write(writing, f"{time.monotonic() - began < 5} {said}".encode())
            finally:
                os._exit(0)
        os.close(writing)
        with os.fdopen(reading) as answer:
            said = answer.read()
        os.waitpid(child, 0)
        assert said.startswith(
            f"True got a cache of process {os.getpid()} in process {child}, which was forked from it"
        )
        assert "does not cross a fork, for its threads stay behind" in said and "\n" not in said
        logits(model, cache, *STEPS[3:])  # ours goes on
        cache.close()
