"""Layers that share the keys of distant tokens give what a naive implementation gives, and really hold less.

The naive one is an attention function that sees the whole sequence in every call (no cache): for each head and query it
takes each token's key from this layer or from the group's lowest, by the token's place alone.
"""

import copy
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

import attnpred
from attnpred.config import CacheConfig
from attnpred.errors import CacheFileError, ConfigError, NotSparseError, UnsupportedModelError
from attnpred.hf import TieredCache, cache_argument, fingerprint
from attnpred.policies import POLICIES, Predicted
from attnpred.predictor.layer_groups import LayerGroups
from attnpred.store import shared
from attnpred.store.pool import BlockPool
from attnpred.store.shared import SharedPool
from tests.hf.support import COVERING, SMALL, greedy, greedy_logits, left_padded, separators
from tests.models import prompt, tiny_model

Groups = tuple[tuple[tuple[int, ...], ...], ...]

SINKS, RECENT = 3, 7
MIXED: Groups = (((0, 1, 2),), ((0,), (1, 2)))
ALONE: Groups = (((0,), (1,), (2,)),) * 2
WINDOWS: dict[str, Any] = {"own_sinks": SINKS, "own_recent": RECENT}


@pytest.fixture(autouse=True)
def few_tokens_can_be_taken_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared, "CROP", 4)  # so that keys are dropped within these short contexts


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., str]:
    """Return a function that writes a file of groups for a model."""

    def save(model: PreTrainedModel, groups: Groups = MIXED) -> str:
        layers = tuple(layer for group in groups[0] for layer in group)
        similarity = tuple(tuple(tuple(1.0 for _ in layers) for _ in layers) for _ in groups)
        found = LayerGroups(
            "tiny", fingerprint(model.config), model.config.num_attention_heads, len(groups), layers, 0.5, 1, groups, similarity
        )  # fmt: skip
        found.save(tmp_path / "groups.json")
        return str(tmp_path / "groups.json")

    return save


def naive_attention(
    leaders: dict[int, tuple[int, ...]], tau: float | None, windows: tuple[int, int], kept: list[Tensor] | None
) -> Callable[..., tuple[Tensor, None]]:
    """Return an attention function for calls without a cache.

    kept: of each layer, which tokens [B, Hkv, T] of the first T are left to the queries behind them.
    """
    sinks, recent = windows
    seen: dict[int, Tensor] = {}  # keys of each layer, in this call of the model
    distant: dict[int, Tensor] = {}  # log-sum-exp of the distant part, [B, Hq, L]

    def attend(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float, **kwargs: Any
    ) -> tuple[Tensor, None]:
        batch, heads, length, _ = query.shape
        group = heads // key.shape[1]
        seen[module.layer_idx] = key
        distant[module.layer_idx] = torch.full((batch, heads, length), -torch.inf)
        output = torch.zeros(batch, length, heads, value.shape[3])
        lows = leaders.get(module.layer_idx, (module.layer_idx,) * key.shape[1])
        for b in range(batch):
            for i in range(length):
                shown = torch.arange(length) <= i if mask is None else mask[b, 0, i]
                begin = int(shown.int().argmax())
                places = [t for t in range(length) if bool(shown[t])]
                near = torch.tensor([t < begin + sinks or i - t < recent for t in places], dtype=torch.bool)
                logits = torch.zeros(heads, len(places))
                for h in range(heads):
                    own, far = (k[b, h // group, places] @ query[b, h, i] for k in (key, seen[lows[h // group]]))
                    logits[h] = torch.where(near, own, far) * scaling
                    if kept is not None and i >= kept[0].shape[2]:
                        left = kept[module.layer_idx][b, h // group]
                        gone = torch.tensor([t < len(left) and not left[t] for t in places])
                        logits[h] = logits[h].masked_fill(gone, -torch.inf)
                if kwargs.get("softcap") is not None:
                    logits = kwargs["softcap"] * torch.tanh(logits / kwargs["softcap"])
                distant[module.layer_idx][b, :, i] = logits[:, ~near].logsumexp(1) if not near.all() else -torch.inf
                for kv in range(key.shape[1]):
                    together = slice(kv * group, (kv + 1) * group)
                    guess = distant[lows[kv]][b, together, i]
                    gate = torch.sigmoid(logits[together][:, near].logsumexp(1) - guess)
                    if tau is not None and lows[kv] != module.layer_idx and bool((gate >= tau).all()):
                        logits[together] = logits[together].masked_fill(~near, -torch.inf)
                extra = kwargs.get("s_aux")
                whole = logits if extra is None else torch.cat((logits, extra[:, None]), 1)
                weights = torch.softmax(whole, 1)[:, : len(places)] if places else logits
                output[b, i] = torch.einsum("ht,htd->hd", weights, value[b].repeat_interleave(group, 0)[:, places])
        return output, None

    return attend


@pytest.fixture
def naive() -> Iterator[Callable[..., None]]:
    """Return a function that gives a model the naive attention, until the test ends."""
    changed: list[tuple[PreTrainedModel, str]] = []

    def switch(
        model: PreTrainedModel,
        groups: Groups = MIXED,
        tau: float | None = None,
        windows: tuple[int, int] = (SINKS, RECENT),
        kept: list[Tensor] | None = None,
    ) -> None:
        layers = [layer for group in groups[0] for layer in group]
        leaders = {i: tuple(next(g[0] for g in head if i in g) for head in groups) for i in layers}
        AttentionInterface.register("naive_pod", naive_attention(leaders, tau, windows, kept))
        AttentionMaskInterface.register("naive_pod", sdpa_mask)
        changed.append((model, model.config._attn_implementation))
        model.set_attn_implementation("naive_pod")

    yield switch
    for model, before in reversed(changed):
        model.set_attn_implementation(before)


# What is computed


@pytest.mark.parametrize("family", ["llama", "qwen3", "olmo2"])
@pytest.mark.parametrize("gate", [None, 0.7])
def test_groups_of_one_layer_change_nothing(family: str, gate: float | None, write: Callable[..., str]) -> None:
    model, tokens = tiny_model(family), prompt(2, 45)
    stock = greedy_logits(model, tokens)
    with attnpred.attach(
        model, policy="pod", layer_groups=write(model, ALONE), distant_gate=gate, **WINDOWS
    ) as attached:
        tokens_found, logits = greedy_logits(model, tokens)
        assert all(type(layer.store) is BlockPool for layer in attached.new_cache().layers)
        assert attached.stats()["saved_bytes"] == 0
    with attnpred.attach(model, policy="full"):
        whole = greedy_logits(model, tokens)
    assert torch.equal(tokens_found, stock[0]) and torch.equal(logits, whole[1])


FAMILIES: dict[str, Groups] = {
    "llama": MIXED,
    "qwen3": (((0, 1), (2,)), ((0, 1, 2),)),
    "smollm3": (((0, 1, 2),),) * 2,
    "gpt_neox": (((0, 1, 2),), ((0, 1), (2,)), ((0,), (1, 2)), ((0,), (1,), (2,))),
    "gemma2": (((0, 2),), ((0,), (2,))),  # softcap, a sliding layer between
    "gpt_oss": (((0, 2),),) * 2,  # attention sinks
}


@pytest.mark.parametrize("family", FAMILIES)
def test_equals_the_naive_implementation(family: str, write: Callable[..., str], naive: Callable[..., None]) -> None:
    model, tokens, groups = tiny_model(family), prompt(2, 37), FAMILIES[family]
    with attnpred.attach(model, policy="pod", layer_groups=write(model, groups), **WINDOWS):
        found, logits = greedy_logits(model, tokens, 12)
    naive(model, groups)
    with torch.no_grad():
        want = model(found, use_cache=False).logits[:, 36:-1].transpose(0, 1)
    torch.testing.assert_close(logits, want, rtol=1e-3, atol=2e-4)
    naive(model, tuple(tuple((layer,) for group in head for layer in group) for head in groups))
    with torch.no_grad():
        apart = model(found, use_cache=False).logits[:, 36:-1].transpose(0, 1)
    assert (want - apart).abs().max() > 0.01, "sharing must matter, or this proves nothing"


WAYS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "chunks": {"prefill_chunk_size": 9},
    "beams": {"num_beams": 3},
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("tau", [None, 0.3])
def test_stock_generate_gives_the_naive_tokens(
    way: str, tau: float | None, write: Callable[..., str], naive: Callable[..., None]
) -> None:
    model, tokens = tiny_model("llama"), prompt(2, 30)
    options = WAYS[way]
    with attnpred.attach(model, policy="pod", layer_groups=write(model), distant_gate=tau, **WINDOWS) as attached:
        found = greedy(model, tokens, 8, **options)
        stats = attached.stats()["total"]
    assert tau is None or 0.05 < stats["distant_skipped"] < 0.95
    assert tau is not None or stats["bytes_read"] == stats["full_bytes"]
    assert tau is None or stats["bytes_read"] < stats["full_bytes"]
    naive(model, MIXED, tau)
    options = {key: value for key, value in options.items() if key != "prefill_chunk_size"}
    assert torch.equal(found, greedy(model, tokens, 8, use_cache=False, **options))


@pytest.mark.parametrize("options", [{}, {"prefill_chunk_size": 11}])
def test_padded_rows_give_what_they_give_alone(options: dict[str, Any], write: Callable[..., str]) -> None:
    model = tiny_model("llama")
    rows = [prompt(1, 45), prompt(1, 30, 1), prompt(1, 5, 2)]
    tokens, mask = left_padded(rows)
    with attnpred.attach(model, policy="pod", layer_groups=write(model), **WINDOWS):
        together = greedy(model, tokens, 16, attention_mask=mask, **options)
        alone = [greedy(model, row, 16) for row in rows]
    for got, want in zip(together, alone, strict=True):
        assert got[-16:].tolist() == want[0, -16:].tolist()


def test_drafted_tokens_can_be_taken_back(write: Callable[..., str]) -> None:
    model, tokens = tiny_model("llama"), prompt(1, 15).repeat(1, 3)
    with attnpred.attach(model, policy="pod", layer_groups=write(model), **WINDOWS):
        assert torch.equal(greedy(model, tokens, 20, prompt_lookup_num_tokens=3), greedy(model, tokens, 20))


@torch.no_grad()
def test_a_crop_beyond_what_is_kept_is_refused_before_anything_changes(write: Callable[..., str]) -> None:
    model, tokens = tiny_model("llama"), prompt(1, 60)
    with attnpred.attach(model, policy="pod", layer_groups=write(model), **WINDOWS) as attached:
        cache, other = attached.new_cache(), attached.new_cache()
        model(tokens, cache=cache)
        with pytest.raises(ConfigError, match=r"got a crop from 60 to 50 tokens, expected at most 4 fewer"):
            cache.crop(-10)
        assert {layer.get_seq_length() for layer in cache.layers} == {60}
        cache.crop(-4)
        model(tokens[:, :56], cache=other)
        got, want = (model(tokens[:, 56:], cache=one).logits for one in (cache, other))
        torch.testing.assert_close(got, want)
        cache.crop(-58)  # to what lies among the sinks: nothing of it was dropped
        assert cache.get_seq_length() == 2
        torch.testing.assert_close(model(tokens[:, 2:], cache=cache).logits[:, -1], want[:, -1], rtol=1e-3, atol=1e-4)


@torch.no_grad()
def test_rows_and_forks_go_their_own_way(write: Callable[..., str]) -> None:
    model, tokens = tiny_model("llama"), prompt(3, 60)
    with attnpred.attach(model, policy="pod", layer_groups=write(model), **WINDOWS) as attached:
        cache = attached.new_cache()
        model(tokens[:, :50], cache=cache)
        fork = cache.fork()
        want = model(tokens[:, 50:], cache=cache).logits
        fork.reorder_cache(torch.tensor([2, 0, 1]))
        again = copy.deepcopy(fork)
        again.batch_select_indices(torch.tensor([0]))
        again.batch_repeat_interleave(2)
        got = model(tokens[[2, 0, 1], 50:], cache=fork).logits
        torch.testing.assert_close(got, want[[2, 0, 1]])
        both = model(tokens[[2, 2], 50:], cache=again).logits
        torch.testing.assert_close(both, want[[2, 2]])
        cache.reset()
        torch.testing.assert_close(model(tokens, cache=cache).logits[:, 50:], want, rtol=1e-3, atol=1e-4)


# What is held


def held(cache: TieredCache) -> int:
    """Return the bytes of all tensors of all stores, found by walking through them."""
    seen: dict[int, int] = {}
    passed: set[int] = set()  # stores of layers that share know each other

    def walk(value: Any) -> None:
        if id(value) in passed:
            return
        if isinstance(value, Tensor):
            seen[value.untyped_storage().data_ptr()] = value.untyped_storage().nbytes()
        elif isinstance(value, list | tuple):
            for one in value:
                walk(one)
        elif type(value).__module__.startswith("attnpred.store"):
            passed.add(id(value))
            walk(list(vars(value).values()))

    walk([layer.store for layer in cache.layers])
    return sum(seen.values())


@torch.no_grad()
def test_distant_keys_are_held_once_and_the_rest_is_freed(write: Callable[..., str]) -> None:
    model, tokens = tiny_model("llama"), prompt(1, 400)
    with attnpred.attach(model, policy="full") as attached:
        whole = attached.new_cache()
        model(tokens, cache=whole)
    row = 400 * 8 * 4  # bytes of the keys of one head
    everything = 3 * 2 * 2 * row
    with attnpred.attach(model, policy="pod", layer_groups=write(model), **WINDOWS) as attached:
        cache = attached.new_cache()
        model(tokens, cache=cache)
        for token in prompt(1, 40, 5).split(1, 1):
            model(token, cache=cache)
        followed = 3 * 440 * 8 * 4  # two heads' layers of the first kv head, one of the second
        saved = cache.stats()["saved_bytes"]
        assert held(whole) == whole.fast_bytes() >= everything
        assert held(cache) == cache.fast_bytes()
        assert 0.95 * followed < saved < followed
        full_now = 3 * 2 * 2 * 440 * 8 * 4
        assert cache.fast_bytes() < 1.2 * (full_now - saved)  # rooms for the next tokens
        for layer in cache.layers:
            if type(layer.store) is SharedPool:
                parts = layer.store.near()
                assert sum(part.keys.shape[2] for part in parts) <= SINKS + RECENT + 2 * shared.CROP


# Together with selection


def test_any_policy_can_select_in_a_cache_that_shares(write: Callable[..., str], naive: Callable[..., None]) -> None:
    model, tokens = tiny_model("llama"), prompt(2, 70)
    config = replace(COVERING, layer_groups=write(model), own_sinks=6, own_recent=10)
    chosen = Predicted()
    with attnpred.attach(model, policy="pod", config=config):
        want, logits = greedy_logits(model, tokens, 10)
    with attnpred.attach(model, policy=chosen, config=config) as attached:
        found, same = greedy_logits(model, tokens, 10)
        assert attached.stats()["total"]["sparse_steps"] == 27
    assert torch.equal(found, want)
    torch.testing.assert_close(same, logits, rtol=1e-3, atol=1e-3)
    with attnpred.attach(model, policy=chosen, config=replace(config, budget=SMALL.budget)) as attached:
        greedy(model, tokens, 10)
        total = attached.stats()["total"]
        assert total["sparse_steps"] == 27 and total["tokens_attended"] <= SMALL.budget
        assert attached.stats()["saved_bytes"] > 0


def settings_of(path: str, **how: Any) -> CacheConfig:
    """Return the settings of these tests with groups, and windows of their own that are those of `SMALL`."""
    return replace(SMALL, layer_groups=path, own_sinks=8, own_recent=8, **how)


EVICTING = [name for name, policy in POLICIES.items() if policy.evicts]


@pytest.mark.parametrize("name", ["snapkv", "streaming", "predicted"])
def test_with_room_for_everything_it_is_pod(name: str, write: Callable[..., str]) -> None:
    model, tokens = tiny_model("llama"), prompt(2, 70)
    chosen: Any = Predicted() if name == "predicted" else name
    config = settings_of(write(model), budget=200)
    with attnpred.attach(model, policy="pod", config=config):
        want, logits = greedy_logits(model, tokens, 10)
    with attnpred.attach(model, policy=chosen, config=config) as attached:
        found, same = greedy_logits(model, tokens, 10)
        assert attached.stats()["total"]["sparse_steps"] == 0
    assert torch.equal(found, want) and torch.equal(same, logits)
    with attnpred.attach(model, policy=chosen, config=replace(config, dense_when_fits=False)) as attached:
        found, same = greedy_logits(model, tokens, 10)
        assert attached.stats()["total"]["sparse_steps"] == 27
    assert torch.equal(found, want)
    torch.testing.assert_close(same, logits, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", EVICTING)
def test_groups_of_one_layer_are_the_policy_alone(name: str, write: Callable[..., str]) -> None:
    model, tokens = tiny_model("llama"), prompt(2, 110)
    config = settings_of(write(model, ALONE))
    with attnpred.attach(model, policy=separators(name), config=replace(config, layer_groups=None)) as attached:
        want, logits = greedy_logits(model, tokens, 10)
        taken = attached.stats()["fast_bytes"]
    with attnpred.attach(model, policy=separators(name), config=config) as attached:
        found, same = greedy_logits(model, tokens, 10)
        assert attached.stats()["fast_bytes"] == taken and attached.stats()["saved_bytes"] == 0
    assert torch.equal(found, want) and torch.equal(same, logits)


def chosen_blocks(cache: TieredCache) -> list[Tensor]:
    """Return what each layer has left, [B, Hkv, N], by what its decoder knows."""
    blocks = -(-cache.get_seq_length() // SMALL.block_size)
    return [cache.decoder(i).left.mask(blocks) for i in range(3)]


@torch.no_grad()
@pytest.mark.parametrize("name", EVICTING)
def test_what_no_layer_of_a_group_needs_is_freed(name: str, write: Callable[..., str]) -> None:
    model, tokens = tiny_model("llama"), prompt(1, 400)
    config = settings_of(write(model))
    with attnpred.attach(model, policy=separators(name), config=replace(config, layer_groups=None)) as attached:
        alone = attached.new_cache()
        model(tokens, cache=alone)
    with attnpred.attach(model, policy="pod", config=config) as attached:
        shared_alone = attached.new_cache()
        model(tokens, cache=shared_alone)
    with attnpred.attach(model, policy=separators(name), config=config) as attached:
        cache = attached.new_cache()
        model(tokens, cache=cache)
        for token in prompt(1, 12, 5).split(1, 1):
            model(token, cache=cache)
        stores = [layer.store for layer in cache.layers]  # what a policy remembers is beside them
        assert held(cache) == sum(store.fast_bytes() for store in stores)
        left = chosen_blocks(cache)
        for head, groups in enumerate(MIXED):
            for group in groups:
                store = cache.layers[group[0]].store
                keys = store._keys.left(left[0].shape[2])[:, store.own.index(head)]
                assert torch.equal(keys, torch.stack([left[i][:, head] for i in group]).any(0))
        for i, layer in enumerate(cache.layers):
            assert torch.equal(layer.store._values.left(left[i].shape[2]), left[i])
    assert cache.fast_bytes() < shared_alone.fast_bytes() / 2
    assert name != "snapkv" or cache.fast_bytes() < 1.2 * alone.fast_bytes()


@torch.no_grad()
@pytest.mark.parametrize("name", ["snapkv", "streaming", "h2o"])
@pytest.mark.parametrize("tokens_at_once", [1, 11])
def test_after_eviction_it_equals_the_naive_implementation(
    name: str, tokens_at_once: int, write: Callable[..., str], naive: Callable[..., None]
) -> None:
    model, tokens = tiny_model("llama"), prompt(2, 121)
    config = settings_of(write(model), budget=48)
    with attnpred.attach(model, policy=name, config=config) as attached:
        cache = attached.new_cache()
        model(tokens[:, :110], cache=cache)
        left = [one.repeat_interleave(SMALL.block_size, 2)[..., :110] for one in chosen_blocks(cache)]
        fork = cache.fork()
        fork.reorder_cache(torch.tensor([1, 0]))
        found = model(tokens[:, 110 : 110 + tokens_at_once], cache=cache).logits
        turned = model(tokens[[1, 0], 110 : 110 + tokens_at_once], cache=fork).logits
    assert any(bool((~one).any()) for one in left)
    torch.testing.assert_close(turned, found[[1, 0]])
    naive(model, windows=(8, 8), kept=left)
    want = model(tokens[:, : 110 + tokens_at_once], use_cache=False).logits[:, 110:]
    torch.testing.assert_close(found, want, rtol=1e-3, atol=2e-4)
    naive(model, windows=(1, 1), kept=left)
    other = model(tokens[:, : 110 + tokens_at_once], use_cache=False).logits[:, 110:]
    assert (want - other).abs().max() > 0.01, "the windows must matter, or this proves nothing"


@torch.no_grad()
@pytest.mark.parametrize("name", ["snapkv", "predicted"])
def test_near_tokens_are_always_attended_to(name: str, write: Callable[..., str]) -> None:
    model, tokens = tiny_model("llama"), prompt(1, 120)
    chosen: Any = Predicted() if name == "predicted" else name
    config = replace(SMALL, layer_groups=write(model), own_sinks=11, own_recent=21)
    with attnpred.attach(model, policy=chosen, config=config) as attached:
        cache = attached.new_cache()
        model(tokens, cache=cache)
        model(tokens[:, :1], cache=cache)
        for layer in range(3):
            zone, blocks = cache.decoder(layer).attended or pytest.fail("nothing was selected")
            near = {0, 1, 2, *range(100 // SMALL.block_size, zone.blocks)}
            assert all(near <= set(head.tolist()) for head in blocks[0])
            assert len(set(blocks[0, 0].tolist())) > len(near)


@torch.no_grad()
@pytest.mark.parametrize("name", ["snapkv", "h2o"])
def test_rows_forks_and_crops_after_eviction(name: str, write: Callable[..., str]) -> None:
    model, tokens = tiny_model("llama"), prompt(2, 130)
    config = settings_of(write(model), budget=48)
    with attnpred.attach(model, policy=name, config=config) as attached:
        cache = attached.new_cache()
        model(tokens[:, :120], cache=cache)
        fork, other = cache.fork(), cache.fork()
        want = [model(token, cache=cache).logits for token in tokens[:, 120:].split(1, 1)]
        fork.batch_select_indices(torch.tensor([1]))
        fork.batch_repeat_interleave(2)
        got = [model(token, cache=fork).logits for token in tokens[[1, 1], 120:].split(1, 1)]
        torch.testing.assert_close(torch.cat(got, 1), torch.cat(want, 1)[[1, 1]])
        model(tokens[:, 120:121], cache=other)
        other.crop(-1)
        assert {layer.get_seq_length() for layer in other.layers} == {120}
        again = model(tokens[:, 120:121], cache=other).logits
        if name == "snapkv":  # what h2o dropped at that step is gone
            torch.testing.assert_close(again, want[0])


def test_padded_rows_give_what_they_give_alone_after_eviction(write: Callable[..., str]) -> None:
    model = tiny_model("llama")
    rows = [prompt(1, 120), prompt(1, 100, 1)]  # whole blocks of padding, so that blocks are cut alike
    tokens, mask = left_padded(rows)
    with attnpred.attach(model, policy="snapkv", config=settings_of(write(model), budget=48)):
        together = greedy(model, tokens, 10, attention_mask=mask)
        alone = [greedy(model, row, 10) for row in rows]
    for got, want in zip(together, alone, strict=True):
        assert got[-10:].tolist() == want[0, -10:].tolist()


# What is refused


def test_what_does_not_fit_together_is_refused(write: Callable[..., str], tmp_path: Path) -> None:
    model, other = tiny_model("llama"), tiny_model("qwen3")
    path = write(model)

    def refused(message: str, kind: type[Exception] = ConfigError, of: PreTrainedModel = model, **how: Any) -> None:
        with pytest.raises(kind, match=message):
            attnpred.attach(of, **({"policy": "pod", "layer_groups": path} | how))
        assert "generate" not in vars(of)

    refused("got .*groups.json of tiny .* expected the same model", of=other)
    refused("got layer_groups with offload='cpu'", offload="cpu")
    gated = {"distant_gate": 0.7, "own_recent": 64}
    refused("got distant_gate with a policy that selects blocks", policy="quest", **gated)
    refused(
        "got budget=1024 with layer_groups and own_recent=4080, expected at least 4128: .* lower own_recent",
        policy="snapkv",
    )
    refused("expected a file of `attnpred analyse-layers`", layer_groups=str(tmp_path / "none.json"))
    refused("got own_recent=0, expected a whole number of at least 1", own_recent=0)
    refused("got distant_gate=1.5, expected a share", distant_gate=1.5)
    refused("without layer_groups", layer_groups=None, distant_gate=0.5)
    refused("whose layers share keys already", UnsupportedModelError, of=tiny_model("gemma4_text"))


@torch.no_grad()
def test_such_a_cache_is_not_saved_and_needs_the_attached_model(write: Callable[..., str], tmp_path: Path) -> None:
    model, tokens = tiny_model("llama"), prompt(1, 40)
    with attnpred.attach(model, policy="pod", layer_groups=write(model), **WINDOWS) as attached:
        cache = attached.new_cache()
        model(tokens, cache=cache)
        with pytest.raises(CacheFileError, match="whose layers share keys"):
            cache.save(tmp_path / "a.kv")
    with pytest.raises(NotSparseError, match="not attached"):
        model(tokens[:, :1], **cache_argument(cache))


def test_pod_without_groups_says_that_nothing_is_shared(caplog: pytest.LogCaptureFixture) -> None:
    model, tokens = tiny_model("llama"), prompt(1, 20)
    stock = greedy(model, tokens, 4)
    with attnpred.attach(model, policy="pod"):
        assert torch.equal(greedy(model, tokens, 4), stock)
    assert "no keys are shared" in caplog.text
