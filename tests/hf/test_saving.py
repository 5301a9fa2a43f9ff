"""A saved cache, loaded, gives the bits that the cache itself would give; what is not whole or does not fit is refused.

The reference is always the cache that was saved: it goes on, and so does the loaded one, with the same tokens.
"""

import copy
import json
import os
import random
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, final

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

import attnpred
from attnpred.config import CacheConfig
from attnpred.errors import AttnpredError, CacheFileError, ConfigError, ShapeError, StoreError, TierFullError
from attnpred.hf import TieredCache, header, saving
from attnpred.policies import POLICIES
from attnpred.policies.base import Policy, View
from attnpred.predictor.pretrained import Predictor, PredictorConfig
from attnpred.store import safetensors_file
from tests.hf.support import SMALL, left_padded, offloaded, predictor, separators
from tests.models import prompt, tiny_model

OFFLOADS = (None, "cpu", "disk")
CNN = Predictor(PredictorConfig("cnn", block_size=SMALL.block_size))
LENGTH = 90  # of the prompt; two tokens of its last block, and the budget holds 64


def predictor_of(policy: str) -> Predictor | None:
    kind = POLICIES[policy].predictor_kind if policy in POLICIES else ""
    return CNN if policy == "cnn" else predictor(kind) if kind else None


def attached(policy: str, settings: CacheConfig = SMALL, family: str = "llama") -> attnpred.hf.Attached:
    name = "predicted" if policy == "cnn" else separators(policy)
    return attnpred.attach(tiny_model(family), policy=name, config=settings, predictor=predictor_of(policy))


@torch.no_grad()
def logits(cache: TieredCache, *calls: Tensor, mask: Tensor | None = None, family: str = "llama") -> Tensor:
    """Return what the model says after each call, [calls, B, V]; mask [B, L] of the tokens before them."""
    found = []
    for tokens in calls:
        if mask is not None:
            mask = torch.cat((mask, torch.ones_like(tokens)), 1)
        out = tiny_model(family)(tokens, attention_mask=mask, cache=cache, use_cache=True)
        found.append(out.logits[:, -1])
    return torch.stack(found)


def singles(count: int, batch: int = 2, seed: int = 50) -> list[Tensor]:
    return [prompt(batch, 1, seed + i) for i in range(count)]


def saved(path: Path, policy: str = "ema", settings: CacheConfig = SMALL, batch: int = 2, **more: Any) -> TieredCache:
    """Save a cache after a prompt and three steps, and return it; the model must be attached."""
    cache = TieredCache(
        tiny_model("llama").config,
        policy="predicted" if policy == "cnn" else separators(policy),
        settings=settings,
        predictor=predictor_of(policy),
    )
    logits(cache, prompt(batch, LENGTH), *singles(3, batch, 10))
    cache.save(path, **more)
    return cache


def load(path: Path, policy: str = "ema", **more: Any) -> TieredCache:
    return TieredCache.load(path, tiny_model("llama"), predictor=predictor_of(policy), **more)


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
        loaded = TieredCache.load(tmp_path / "a.kv", tiny_model(family), predictor=predictor())
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


# The file


def test_any_safetensors_library_reads_it(tmp_path: Path) -> None:
    with attached("predicted"):
        cache = saved(tmp_path / "a.kv", "predicted", tokens=prompt(2, LENGTH + 4))
    with safe_open(tmp_path / "a.kv", "pt") as file:  # type: ignore[no-untyped-call]
        said = {name: json.loads(text) for name, text in file.metadata().items() if name != "sum"}
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    assert stat.S_IMODE((tmp_path / "a.kv").stat().st_mode) == 0o600
    wanted = {"length": LENGTH + 3, "batch": 2, "dtype": "float32", "block_size": 4, "policy": "predicted"}
    assert said.items() >= wanted.items() and said["rope"]["rope_type"] == "default"
    assert said["settings"]["budget"] == 64 and "offload_dir" not in said["settings"]
    assert said["fingerprint"] == "llama-3-32-4-97"
    assert torch.equal(tensors["tokens"], prompt(2, LENGTH + 4)[:, :-1])
    keys = cache.layers[2].store.keys
    units = tensors["layers.2.units"].view(torch.float32)
    assert units.shape == (2, 23, 2, 4 * (8 + 8))
    assert torch.equal(units[1, 5, 0, : 4 * 8].view(4, 8), keys[1, 0, 20:24])
    assert torch.equal(tensors["layers.2.keys"], keys[:, :, 92:93])


KILLED = """
import os, sys
from pathlib import Path
import torch
from attnpred.hf import TieredCache
from attnpred.store import safetensors_file
from tests.hf.support import SMALL
from tests.models import tiny_model

model = tiny_model("llama")
cache = TieredCache(model.config, policy="ema", settings=SMALL)
for layer in range(3):
    cache.update(torch.ones(1, 2, 90, 8), torch.ones(1, 2, 90, 8), layer)
path, put = Path(sys.argv[1]), safetensors_file.put
if path.exists():
    count = iter(range(99))
    def dying(fd, data):
        put(fd, data[: len(data) // 2])
        if next(count) == 4:
            os.kill(os.getpid(), 9)
        put(fd, data[len(data) // 2 :])
    safetensors_file.put = dying
cache.save(path, model=model)
"""


@pytest.mark.slow
def test_a_killed_save_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "a.kv"
    with attached("ema"):
        cache = saved(path)
        run = subprocess.run([sys.executable, "-c", KILLED, str(path)], cwd=Path(__file__).parents[2])
        assert run.returncode == -signal.SIGKILL
        assert len(list(tmp_path.iterdir())) == 2  # the other is half of a new one
        loaded = load(path)
        assert torch.equal(logits(loaded, *singles(2)), logits(cache, *singles(2)))
        loaded.save(path)
    assert [found.name for found in tmp_path.iterdir()] == ["a.kv"]


def test_a_save_that_fails_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with attached("ema"):
        cache = saved(tmp_path / "a.kv")
        before = (tmp_path / "a.kv").read_bytes()
        monkeypatch.setattr(
            safetensors_file.os, "write", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left"))
        )
        with pytest.raises(CacheFileError, match=r"got No space left for .*a\.kv, expected to write a file there"):
            cache.save(tmp_path / "a.kv")
    assert (tmp_path / "a.kv").read_bytes() == before and len(list(tmp_path.iterdir())) == 1


def places(path: Path) -> Iterator[tuple[str, int]]:
    """Yield bytes to change: some of the header, and of every kind of tensor."""
    file = safetensors_file.SafetensorsFile(path)
    end = int.from_bytes(path.read_bytes()[:8], "little")
    text = len(path.read_bytes()[8 : 8 + end].rstrip())
    yield from (("header", place) for place in (0, 5, *range(8, 8 + text, text // 40)))
    for name in file.names:
        size = file.shape(name) and file.tensor(name).nbytes
        if size and name.partition(".")[2][:1] in ("", "1"):  # of one layer
            yield name, file.place(name) + size // 2
            yield name, file.place(name) + size - 1
    file.close()


@pytest.mark.parametrize(("policy", "offload"), [("predicted", "cpu"), ("predicted", None), ("cnn", None)])
def test_a_changed_bit_never_becomes_a_token(policy: str, offload: str | None, tmp_path: Path) -> None:
    path = tmp_path / "a.kv"
    calls = [*singles(1), prompt(2, 3)]  # the second reads everything
    with attached(policy, settings := replace(SMALL, offload=offload)):
        want = logits(saved(path, policy, settings, tokens=prompt(2, LENGTH + 3)), *calls)
        whole, refused = path.read_bytes(), set()
        for name, place in places(path):
            path.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << place % 7]) + whole[place + 1 :])
            try:
                assert torch.equal(logits(load(path, policy), *calls), want), name
            except AttnpredError as error:
                refused.add(name)
                assert "\n" not in str(error) and "expected" in str(error)
                if name in ("layers.1.units", "layers.1.checks"):
                    assert "layer 1, block " in str(error) and str(path) in str(error)
    assert {"header", "tokens", "layers.1.units", "layers.1.checks", "layers.1.keys"} <= refused
    assert sum(name.startswith("decoders.1.memory.") for name in refused) >= 2


def test_a_truncated_file_is_refused(tmp_path: Path) -> None:
    with attached("ema"):
        saved(tmp_path / "a.kv")
    whole = (tmp_path / "a.kv").read_bytes()
    for size in (0, 7, 1000, len(whole) // 2, len(whole) - 1):
        (tmp_path / "a.kv").write_bytes(whole[:size])
        with pytest.raises(CacheFileError, match=r"truncated"):
            load(tmp_path / "a.kv")


def test_a_file_cut_off_while_it_is_read_is_an_error(tmp_path: Path) -> None:
    with attached("ema", settings := replace(SMALL, offload="cpu")):
        saved(tmp_path / "a.kv", settings=settings)
        cache = load(tmp_path / "a.kv")
        os.truncate(tmp_path / "a.kv", 6000)
        with pytest.raises(StoreError, match=r"layer \d, block \d+.* got the end of .*a.kv"):
            logits(cache, prompt(2, 2))


# What does not fit


def small_model(**changes: Any) -> PreTrainedModel:
    """Return a model like the tiny one, but for `changes` of its config."""
    config = LlamaConfig(**(tiny_model("llama").config.to_dict() | changes))
    return AutoModelForCausalLM.from_config(config, dtype=changes.get("dtype", torch.float32))  # type: ignore[no-any-return]


def test_another_model_is_refused(tmp_path: Path) -> None:
    with attached("ema"):
        saved(tmp_path / "a.kv")
    changes: list[dict[str, Any]] = [
        {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
        {"num_hidden_layers": 4},
        {"rms_norm_eps": 1e-5},
    ]
    for change in changes:
        with pytest.raises(CacheFileError, match=r"llama-3-32-4-97.*expected the same config: load the model"):
            TieredCache.load(tmp_path / "a.kv", small_model(**change))
    with pytest.raises(CacheFileError, match=r"saved in float32, for a model in bfloat16, expected the same"):
        TieredCache.load(tmp_path / "a.kv", small_model(dtype=torch.bfloat16))
    same = small_model(use_cache=False)
    same.config._name_or_path = "elsewhere/llama"
    with pytest.raises(CacheFileError, match=r"saved with other weights of this model, expected the same"):
        TieredCache.load(tmp_path / "a.kv", same)
    same.load_state_dict(tiny_model("llama").state_dict())
    TieredCache.load(tmp_path / "a.kv", same)  # a name says nothing of the weights


def test_the_predictor_must_be_the_same(tmp_path: Path) -> None:
    with attached("predicted"):
        saved(tmp_path / "a.kv", "predicted")
    model = tiny_model("llama")
    other = Predictor(PredictorConfig(kind="streaming", block_size=4))
    with torch.no_grad():
        other.streaming.forecast.add_(1)
    for given, message in (
        (None, "a predictor that does not come with attnpred, expected it: pass predictor="),
        (other, "got a policy or predictor other than .* was saved with"),
        (CNN, "got a policy or predictor other than .* was saved with"),
    ):
        with pytest.raises(CacheFileError, match=message):
            TieredCache.load(tmp_path / "a.kv", model, predictor=given)


def test_a_shipped_predictor_is_found_again(tmp_path: Path) -> None:
    model = tiny_model("llama")
    settings = replace(SMALL, block_size=16, num_sink_tokens=16, recent_window=16, budget=80)
    for name in ("general", "attention-predictor-cnn"):
        with attnpred.attach(model, policy="predicted", config=settings, predictor=name) as handle:
            cache = handle.new_cache()
            logits(cache, prompt(1, 150), *singles(2, 1))
            cache.save(tmp_path / "a.kv")
            loaded = TieredCache.load(tmp_path / "a.kv", model)
            assert type(loaded.policy) is type(cache.policy)
            assert torch.equal(logits(loaded, *singles(3, 1)), logits(cache, *singles(3, 1)))


@final
@dataclass(frozen=True, slots=True)
class Own(Policy[Any]):
    """Prefer some blocks."""

    every: int = 2

    def score(self, view: View[Any]) -> Tensor:
        return (torch.arange(view.zone.blocks) % self.every).float().expand(1, 1, -1)


def test_a_policy_of_ones_own_is_brought_along(tmp_path: Path) -> None:
    model = tiny_model("llama")
    with attnpred.attach(model, policy=Own(3), config=SMALL) as handle:
        cache = handle.new_cache()
        logits(cache, prompt(1, 90))
        cache.save(tmp_path / "a.kv")
        for policy, message in (
            (None, "of policy Own, expected one that comes with"),
            (Own(2), "expected Own {'every': 3}"),
        ):
            with pytest.raises(CacheFileError, match=message):
                TieredCache.load(tmp_path / "a.kv", model, policy=policy)
        loaded = TieredCache.load(tmp_path / "a.kv", model, policy=Own(3))
        assert torch.equal(logits(loaded, *singles(3, 1)), logits(cache, *singles(3, 1)))


def test_settings_that_matter_cannot_change(tmp_path: Path) -> None:
    with attached("ema"):
        saved(tmp_path / "a.kv")
    assert set(header.FREE) <= set(CacheConfig.__dataclass_fields__)
    for name in ("budget", "block_size", "hysteresis", "offload_dtype", "anything"):
        with pytest.raises(ConfigError, match=f"got setting '{name}', expected one of disk_limit, .*, strict: "):
            load(tmp_path / "a.kv", **{name: 1})
    changed: dict[str, Any] = {"strict": True, "late_share": 0.5, "measure_recovery": True, "fetch_timeout": 2.0}
    assert load(tmp_path / "a.kv", **changed).settings == replace(SMALL, **changed)


def test_files_that_are_no_caches_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_file({"a": torch.zeros(2)}, tmp_path / "tensors")
    with attached("ema"), monkeypatch.context() as patch:
        patch.setattr(header, "FORMAT", "1")
        saved(tmp_path / "new")
    os.mkfifo(tmp_path / "pipe")
    for name, message in (
        ("pipe", "which is no file, expected a saved cache: check the name"),
        ("tensors", "which is no saved cache, expected one of `cache.save`"),
        ("new", "in format 1, expected 2: update attnpred, or save the cache again"),
        ("none", "got No such file or directory for .*none, expected a saved cache"),
    ):
        with pytest.raises(CacheFileError, match=message):
            load(tmp_path / name)


def test_what_cannot_be_saved_is_refused(tmp_path: Path) -> None:
    cache = TieredCache(tiny_model("llama").config, policy="ema", settings=SMALL)
    with pytest.raises(CacheFileError, match="got an empty cache, expected one that holds tokens"):
        cache.save(tmp_path / "a.kv")
    with attached("ema"):
        with pytest.raises(ShapeError, match=r"got tokens of shape \(2, 92\), expected \(2, 93\) or longer"):
            saved(tmp_path / "a.kv", tokens=prompt(2, LENGTH + 2))
        cache = TieredCache(tiny_model("llama").config, policy="ema", settings=SMALL)
        logits(cache, prompt(1, 20))
    cache.layers[1] = object()  # type: ignore[call-overload]
    with pytest.raises(CacheFileError, match="got a cache layer of type object, expected keys and values"):
        cache.save(tmp_path / "a.kv")
    assert not list(tmp_path.iterdir())


def test_limits_hold_for_what_is_loaded(tmp_path: Path) -> None:
    with attached("ema"):
        saved(tmp_path / "a.kv")
        with pytest.raises(TierFullError, match="fast_limit"):
            load(tmp_path / "a.kv", fast_limit=10_000)
        limited: dict[str, Any] = {"offload": "cpu", "host_limit": 1 << 20}
        load(tmp_path / "a.kv", **limited).admit(
            LENGTH + 30, 2, torch.float32
        )  # what lies in the file is not host memory
        fresh = TieredCache(tiny_model("llama").config, policy="ema", settings=replace(SMALL, **limited))
        shorter, longer = load(tmp_path / "a.kv", **limited), load(tmp_path / "a.kv", **limited)
        shorter.crop(-60)
        for cache, length in ((fresh, LENGTH + 30), (shorter, LENGTH + 30), (longer, 2 * LENGTH)):
            with pytest.raises(TierFullError, match="host_limit"):
                cache.admit(length, 2, torch.float32)


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
            cache = TieredCache.load(path, model, prefix=ids, predictor=predictor(), offload_dir=whole.offload_dir)
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


def test_the_layout_is_what_a_reader_expects() -> None:
    """A change of these changes the format: then `FORMAT` must change as well."""
    assert (header.FORMAT, saving.TOKENS, saving.WINDOW) == (
        "2",
        "tokens",
        ("sliding_window", "cumulative_length", "record_past"),
    )


VALUES = [None, True, -1, 0, 10**30, 1.5, "", "x", [], [1], {}, {"a": 1}, [[None]], "9" * 400]


def parts(value: Any, place: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield where each part of a value of JSON is, the first two of a list."""
    yield place
    if isinstance(value, dict):
        for name in value:
            yield from parts(value[name], (*place, name))
    elif isinstance(value, list):
        for index in range(min(len(value), 2)):
            yield from parts(value[index], (*place, index))


def changed(value: Any, place: tuple[Any, ...], new: Any) -> Any:
    if not place:
        return new
    value = copy.copy(value)
    value[place[0]] = changed(value[place[0]], place[1:], new)
    return value


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_a_header_that_somebody_wrote_is_one_error(family: str, tmp_path: Path) -> None:
    """Its sum is right, and any part of it is of another type or beyond all bounds: never an error of another kind."""
    model, done = tiny_model(family), [0, 0]
    with attnpred.attach(model, policy="ema", config=SMALL) as handle:
        with handle.new_cache() as cache, torch.no_grad():
            model(prompt(1, 60), past_key_values=cache)
            cache.save(tmp_path / "a.kv", prompt(1, 60))
        raw = (tmp_path / "a.kv").read_bytes()
        size = int.from_bytes(raw[:8], "little")
        content, data = json.loads(raw[8 : 8 + size]), raw[8 + size :]
        chance = random.Random(1)
        for field in sorted(set(content["__metadata__"]) - {header._SUM, header._MARK}):
            value = json.loads(content["__metadata__"][field])
            for place in parts(value):
                for new in chance.sample(VALUES, 3):
                    texts = content["__metadata__"] | {field: json.dumps(changed(value, place, new))}
                    del texts[header._SUM]
                    texts[header._SUM] = header._sha256(header._json(texts).encode())
                    text = json.dumps(content | {"__metadata__": texts}).encode()
                    (tmp_path / "b.kv").write_bytes(len(text).to_bytes(8, "little") + text + data)
                    try:
                        TieredCache.load(tmp_path / "b.kv", model).close()
                        done[0] += 1  # what only says something, or could be so
                    except AttnpredError as error:
                        assert "\n" not in str(error) and len(str(error)) < 600
                        done[1] += 1
    assert done[0] < done[1] > 100
