"""A file that is not whole, or does not fit model and settings, is refused in one line; a save that fails loses nothing."""

import copy
import json
import os
import random
import signal
import stat
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, final

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

import attnpred
from attnpred.config import CacheConfig
from attnpred.errors import AttnpredError, CacheFileError, ConfigError, ShapeError, StoreError, TierFullError
from attnpred.hf import TieredCache, header, saving
from attnpred.policies.base import Policy, View
from attnpred.predictor.pretrained import Predictor
from attnpred.store import safetensors_file
from tests.hf.saved import LENGTH, attached, load, logits, saved, singles, small_model
from tests.hf.support import SMALL, predictor
from tests.models import prompt, tiny_model

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
cache = TieredCache(model.config, policy="ema", config=SMALL)
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
    with attached("seer"):
        saved(tmp_path / "a.kv", "seer")
    model = tiny_model("llama")
    other = Predictor(predictor("seer-gate").config)
    with torch.no_grad():
        next(iter(other.parameters())).add_(1)
    for given, message in (
        (None, "a predictor that does not come with attnpred, expected it: pass predictor="),
        (other, "got a policy or predictor other than .* was saved with"),
    ):
        with pytest.raises(CacheFileError, match=message):
            TieredCache.load(tmp_path / "a.kv", model, predictor=given)


def test_a_shipped_predictor_is_found_again(tmp_path: Path) -> None:
    model = tiny_model("llama")
    settings = replace(SMALL, block_size=16, num_sink_tokens=16, recent_window=16, budget=80)
    for name in (None, "attention-predictor-cnn"):
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
    cache = TieredCache(tiny_model("llama").config, policy="ema", config=SMALL)
    with pytest.raises(CacheFileError, match="got an empty cache, expected one that holds tokens"):
        cache.save(tmp_path / "a.kv")
    with attached("ema"):
        with pytest.raises(ShapeError, match=r"got tokens of shape \(2, 92\), expected \(2, 93\) or longer"):
            saved(tmp_path / "a.kv", tokens=prompt(2, LENGTH + 2))
        cache = TieredCache(tiny_model("llama").config, policy="ema", config=SMALL)
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
        fresh = TieredCache(tiny_model("llama").config, policy="ema", config=replace(SMALL, **limited))
        shorter, longer = load(tmp_path / "a.kv", **limited), load(tmp_path / "a.kv", **limited)
        shorter.crop(-60)
        for cache, length in ((fresh, LENGTH + 30), (shorter, LENGTH + 30), (longer, 2 * LENGTH)):
            with pytest.raises(TierFullError, match="host_limit"):
                cache.admit(length, 2, torch.float32)


# The header


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
