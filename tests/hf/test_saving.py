"""A saved cache, loaded, gives the bits that the cache itself would give.

The reference is always the cache that was saved: it goes on, and so does the loaded one, with the same tokens.
"""

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import attnpred
from attnpred.errors import CacheFileError, ConfigError, ShapeError
from attnpred.hf import TieredCache
from attnpred.policies import POLICIES
from tests.hf.saved import LENGTH, OFFLOADS, attached, load, logits, saved, singles, small_model
from tests.hf.support import SMALL, left_padded, offloaded
from tests.models import prompt, tiny_model

# Going on


@pytest.mark.parametrize("offload", OFFLOADS)
@pytest.mark.parametrize("policy", [*POLICIES, "cnn"])
def test_it_goes_on_where_it_was(policy: str, offload: str | None, tmp_path: Path) -> None:
    with attached(policy, settings := offloaded(SMALL, offload, tmp_path)):
        cache = saved(tmp_path / "a.kv", policy, settings)
        loaded = load(tmp_path / "a.kv", policy, offload_dir=settings.offload_dir)
        assert loaded.settings == settings and loaded.get_seq_length() == LENGTH + 3
        want = logits(cache, *singles(7))
        assert torch.equal(logits(loaded, *singles(7)), want)
        layer = loaded.stats()["layers"][1]
        assert layer["steps"] == 7 and layer["sparse_steps"] == (
            0 if policy in POLICIES and POLICIES[policy].is_dense else 7
        )
        if offload == "disk":
            loaded.close()
            cache.close()


@pytest.mark.parametrize(
    ("policy", "other"),
    [
        ("predicted", {"hysteresis": 0.5}),  # it depends on what was attended last
        ("predicted", {"late_share": 0.1}),  # on what was forecast
        ("predicted", {"per_query_head": True, "dense_layers": 2}),
        ("quest", {"dense_layers": (0, 2)}),
        ("ema", {"calibration_interval": 4, "budget": 0.5}),  # on how many steps there were
    ],
)
def test_so_it_does_with_other_settings(policy: str, other: dict[str, Any], tmp_path: Path) -> None:
    with attached(policy, settings := replace(SMALL, offload="cpu", **other)):
        cache = saved(tmp_path / "a.kv", policy, settings)
        loaded = load(tmp_path / "a.kv", policy)
        assert torch.equal(logits(loaded, *singles(7)), logits(cache, *singles(7)))


@pytest.mark.parametrize("offload", [None, "cpu"])
@pytest.mark.parametrize("family", ["gemma3_text", "gemma4_text", "gpt_oss", "mistral-sliding"])
def test_other_layers_go_on_as_well(family: str, offload: str | None, tmp_path: Path) -> None:
    """Sliding windows, layers that share keys, sinks; with two rows, one of them padded on the left."""
    tokens, mask = left_padded([prompt(1, 110, 1), prompt(1, 73, 2)])
    with attached("predicted", replace(SMALL, offload=offload), family) as handle:
        cache = handle.new_cache()
        logits(cache, tokens, *singles(2, seed=10), mask=mask, family=family)
        cache.save(tmp_path / "a.kv")
        loaded = TieredCache.load(tmp_path / "a.kv", tiny_model(family))
        mask = torch.cat((mask, torch.ones(2, 2, dtype=mask.dtype)), 1)
        want = logits(cache, *singles(6), mask=mask, family=family)
        assert torch.equal(logits(loaded, *singles(6), mask=mask, family=family), want)


@pytest.mark.parametrize("before", OFFLOADS)
@pytest.mark.parametrize("after", OFFLOADS)
def test_it_may_lie_elsewhere_afterwards(before: str | None, after: str | None, tmp_path: Path) -> None:
    with attached("predicted", settings := offloaded(SMALL, before, tmp_path)):
        cache = saved(tmp_path / "a.kv", "predicted", settings)
        folder = tmp_path if after == "disk" else None
        loaded = load(tmp_path / "a.kv", "predicted", offload=after, offload_dir=folder, host_limit=None)
        want = logits(cache, *singles(6), prompt(2, 9), *singles(2))  # steps, a chunk that reads everything, steps
        assert torch.equal(logits(loaded, *singles(6), prompt(2, 9), *singles(2)), want)
        assert loaded.settings.offload == after


@pytest.mark.parametrize("budget", [64, 128])
def test_rounded_blocks_keep_their_value(budget: int, tmp_path: Path) -> None:
    """Also where nothing is rounded yet, because it all lies in fast memory, and will be: from token 128 on."""
    settings = replace(SMALL, budget=budget, offload="cpu", offload_dtype="int8", dense_layers=1)
    with attached("ema", settings):
        cache = saved(tmp_path / "a.kv", settings=settings)
        assert (cache.layers[1].store.sealed is None) == (budget == 128)
        loaded = load(tmp_path / "a.kv")
        assert torch.equal(logits(loaded, *singles(45)), logits(cache, *singles(45)))
        assert loaded.layers[1].store.sealed is not None and not loaded.layers[1].store.sealed.is_exact
        with pytest.raises(ConfigError, match="got offload_dtype='int8' without offload"):
            load(tmp_path / "a.kv", offload=None)


@pytest.mark.parametrize("offload", [None, "cpu"])
def test_a_loaded_cache_can_do_all_that_others_can(offload: str | None, tmp_path: Path) -> None:
    """Above all cut into what lies in the file, write elsewhere, and be saved again, in place of what it lies in."""
    path = tmp_path / "a.kv"
    with attached("ema", settings := replace(SMALL, offload=offload)):
        pair = [saved(path, settings=settings), load(path)]
        for cache in pair:
            cache.crop(-21)
        assert torch.equal(*(logits(cache, prompt(2, 15), *singles(5)) for cache in pair))
        for cache in pair:
            cache.reorder_cache(torch.tensor([1, 0]))
            cache.batch_repeat_interleave(2)
            cache.batch_select_indices(torch.tensor([0, 1, 3]))
        assert torch.equal(*(logits(cache, *singles(5, 3)) for cache in pair))
        before = path.stat().st_ino
        pair[1].save(path)
        assert path.stat().st_ino != before
        pair.append(load(path))
        results = [logits(cache, *singles(6, 3)) for cache in pair]
        assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])
        for cache in pair:
            cache.reset()
        assert torch.equal(logits(pair[0], prompt(1, 80)), logits(pair[2], prompt(1, 80)))


def test_a_cache_of_less_than_a_block(tmp_path: Path) -> None:
    for offload in (None, "cpu"):
        with attached("predicted", replace(SMALL, offload=offload)) as handle:
            cache = handle.new_cache()
            logits(cache, prompt(1, 3))
            cache.save(tmp_path / "a.kv")
            assert torch.equal(
                logits(load(tmp_path / "a.kv", "predicted"), prompt(1, 90), *singles(2, 1)),
                logits(cache, prompt(1, 90), *singles(2, 1)),
            )


# In time


@pytest.mark.parametrize("offload", [None, "cpu"])
def test_loading_reads_next_to_nothing(offload: str | None, tmp_path: Path) -> None:
    path, tokens = tmp_path / "a.kv", 32_000
    model = small_model(num_attention_heads=8, num_key_value_heads=8, head_dim=32, num_hidden_layers=2)
    settings = replace(SMALL, block_size=16, num_sink_tokens=16, recent_window=16, budget=80, offload=offload)
    with attnpred.attach(model, policy="last_step", config=settings) as handle:
        cache = handle.new_cache()
        for index in range(2):
            keys = torch.randn(1, 8, tokens, 32, generator=torch.Generator().manual_seed(index))
            cache.update(keys, -keys, index)
        cache.save(path)
        with torch.no_grad():
            want = model(prompt(1, 1), cache=cache, use_cache=True).logits
        cache.close()
        size = path.stat().st_size
        assert size > 120e6
        read, began = bytes_read(), time.perf_counter()
        loaded = TieredCache.load(path, model)
        assert time.perf_counter() - began < 1
        assert bytes_read() - read < size / 20
        with torch.no_grad():
            assert torch.equal(model(prompt(1, 1), cache=loaded, use_cache=True).logits, want)
        assert bytes_read() - read < size / 10 if offload else bytes_read() - read > size / 2


def bytes_read() -> int:
    """What this process has read of files so far; skips where the system does not say."""
    try:
        lines = Path("/proc/self/io").read_text(encoding="ascii").splitlines()
    except OSError:
        pytest.skip("no /proc/self/io")
    return int(lines[0].removeprefix("rchar: "))


def test_a_layer_is_read_when_it_is_first_used(tmp_path: Path) -> None:
    with attached("ema"):
        cache = saved(tmp_path / "a.kv")
        loaded = load(tmp_path / "a.kv")
        loaded.crop(-60)
        stores = [layer.store for layer in loaded.layers]
        assert loaded.get_seq_length() == LENGTH - 57
        assert loaded.fast_bytes() < cache.fast_bytes() / 4  # what the policy remembers
        cache.crop(-60)
        assert torch.equal(stores[1].view()[0], cache.layers[1].store.view()[0])
        assert stores[1].fast_bytes() > 0 and stores[2].fast_bytes() == 0


# Tokens, and a prefix of them


@pytest.mark.parametrize("offload", OFFLOADS)
def test_a_prefix_is_not_computed_again(offload: str | None, tmp_path: Path) -> None:
    model, path = tiny_model("llama"), tmp_path / "a.kv"
    whole = offloaded(replace(SMALL, budget=1.0), offload, tmp_path)
    fed: list[int] = []
    hook = model.register_forward_pre_hook(
        lambda _, args, kwargs: fed.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    first = prompt(1, 60)
    with attached("predicted", whole) as handle:
        cache = handle.new_cache()
        told = model.generate(
            first, attention_mask=torch.ones_like(first), max_new_tokens=10, do_sample=False, cache=cache
        )
        cache.save(path)
        cache.close()
    other = torch.cat((told[:, :33], prompt(1, 30, 9)), 1)
    for ids, kept in (
        (torch.cat((told, prompt(1, 20, 8)), 1), 69),  # the last token that was generated was never fed
        (other, 33),
        (told[:, :40], 39),
        (told[:, :69], 68),
        (prompt(1, 30, 7), 0),
    ):
        asked = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 5, "do_sample": False}
        want = model.generate(ids, **asked)
        with attached("predicted", whole):
            cache = TieredCache.load(path, model, prefix=ids, offload_dir=whole.offload_dir)
            assert cache.get_seq_length() == kept
            fed.clear()
            assert torch.equal(model.generate(ids, cache=cache, **asked), want)
            assert fed == [ids.shape[1] - kept, 1, 1, 1, 1]
            assert cache.tokens is not None and torch.equal(cache.tokens, want[:, :-1])
            cache.close()
    hook.remove()


def test_where_a_prefix_cannot_be_used(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "a.kv"
    with attached("ema"):
        saved(path)
        with pytest.raises(
            CacheFileError, match="with no tokens, expected the tokens of one row: save it with tokens="
        ):
            load(path, prefix=prompt(1, 20))
        saved(path, tokens=prompt(2, 200))
        with pytest.raises(CacheFileError, match="with 2 rows, expected the tokens of one row"):
            load(path, prefix=prompt(1, 20))
        with pytest.raises(ShapeError, match=r"got a prefix of shape \(2, 20\)"):
            load(path, prefix=prompt(2, 20))
    with attached("ema", family="gemma3_text") as handle:
        for length, kept in ((20, 10), (90, 0)):  # the window is 24
            cache = handle.new_cache()
            tokens = prompt(1, length)
            logits(cache, tokens, family="gemma3_text")
            cache.save(path, tokens)
            for ids, common in ((tokens[0, :11], kept), (torch.cat((tokens, tokens), 1), length)):
                found = TieredCache.load(path, tiny_model("gemma3_text"), prefix=ids)
                assert found.get_seq_length() == common
    assert caplog.text.count("because of its sliding layers: nothing of it is used") == 1


def test_generate_notes_the_tokens(tmp_path: Path) -> None:
    model, ids = tiny_model("llama"), prompt(2, 70)
    asked: dict[str, Any] = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 4, "do_sample": False}
    with attached("ema") as handle:
        cache = handle.new_cache()
        out = model.generate(ids, cache=cache, return_dict_in_generate=True, **asked)
        assert cache.tokens is not None and torch.equal(cache.tokens, out.sequences[:, :-1])
        cache.save(tmp_path / "a.kv")
        loaded = load(tmp_path / "a.kv")
        assert loaded.tokens is not None and torch.equal(loaded.tokens, cache.tokens)
        loaded.crop(-3)
        loaded.reorder_cache(torch.tensor([1, 0]))
        loaded.batch_select_indices(torch.tensor([0]))
        loaded.batch_repeat_interleave(3)
        assert torch.equal(loaded.tokens, cache.tokens[1:, :70].expand(3, -1))
        logits(cache, prompt(2, 1))
        assert cache.tokens is None  # nobody said what it was
        for known in (None, ids):  # and what is not about all of it is not saved
            cache.tokens = known
            cache.save(tmp_path / "a.kv")
            assert load(tmp_path / "a.kv").tokens is None
        loaded.reset()
        assert loaded.tokens is None
        embedded = {"inputs_embeds": model.get_input_embeddings()(ids)}
        for given, more in ((ids, {"num_beams": 2}), (None, embedded), (ids, embedded)):
            cache = handle.new_cache()
            model.generate(given, cache=cache, **asked, **more)
            assert cache.get_seq_length() == 73 and cache.tokens is None
