"""Every promised family: the tokens of stock `generate` with a full budget, and really less read with a small one.

"Sparse over everything" forces the sparse path although all blocks are selected, so it must agree with stock, too:
masks, softcaps, attention sinks, positions and shared keys are then right in the sparse path as well.
"""

import logging
from dataclasses import replace
from functools import cache

import pytest
import torch
from torch import Tensor

import attnpred
from attnpred.telemetry import DENSE_LAYER, FITS
from tests.hf.support import COVERING, SMALL, WHOLE, greedy, greedy_logits
from tests.models import FAMILIES, prompt, tiny_model

NEW, STEPS = 24, 23  # the first token comes from the prompt's pass

MIXED = dict.fromkeys(("gemma2", "gemma3_text", "gpt_oss", "cohere2"), (0, 2))
LATE = dict.fromkeys(("qwen3_next", "qwen3_5_text", "bamba", "nemotron_h"), (1, 2)) | {"jamba": (1,)}
FULL_LAYERS = dict.fromkeys(FAMILIES, (0, 1, 2)) | MIXED | LATE | {"mistral-sliding": (), "gemma4_text": (0, 3)}
"""The full-attention layers of each tiny model; layer 3 of gemma4 reads the keys and values that layer 0 stores."""

WITH_FULL_LAYERS = [family for family in FAMILIES if FULL_LAYERS[family]]
KV_HEADS = {"gpt_neox": 4, "biogpt": 4}
HEAD_BYTES = 2 * 8 * 4  # keys and values of one token and head: 8 numbers of fp32 each


@cache
def stock(family: str) -> tuple[Tensor, Tensor]:
    return greedy_logits(tiny_model(family), prompt(2, 60), NEW)


def assert_same(got: tuple[Tensor, Tensor], want: tuple[Tensor, Tensor]) -> None:
    assert torch.equal(got[0], want[0])
    torch.testing.assert_close(got[1], want[1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_random_models_look_far_back(family: str) -> None:
    """Or equal logits would prove nothing: they move from step to step, and with tokens that stood 50 before."""
    _, logits = stock(family)
    changed = prompt(2, 60).index_fill(1, torch.arange(4, 12), 50)
    other = greedy_logits(tiny_model(family), changed, 1)[1][0]
    assert (other - logits[0]).abs().max() > 0.05
    assert (logits[1:] - logits[:-1]).abs().max() > 0.05


@pytest.mark.parametrize("family", FAMILIES)
def test_full_budget_gives_stock_tokens(family: str) -> None:
    model = tiny_model(family)
    with attnpred.attach(model, policy="ema", config=WHOLE) as attached:
        got = greedy_logits(model, prompt(2, 60), NEW)
    assert_same(got, stock(family))
    layers = attached.stats()["layers"]
    assert [layer["layer"] for layer in layers] == list(FULL_LAYERS[family])
    assert all(layer["dense"] == {FITS: STEPS} and layer["compression"] == 1.0 for layer in layers)


@pytest.mark.parametrize("dense_layers", [0, 1])
@pytest.mark.parametrize("family", WITH_FULL_LAYERS)
def test_sparse_over_everything_gives_stock_tokens(family: str, dense_layers: int) -> None:
    model = tiny_model(family)
    with attnpred.attach(model, policy="ema", config=COVERING, dense_layers=dense_layers) as attached:
        got = greedy_logits(model, prompt(2, 60), NEW)
    assert_same(got, stock(family))
    # What layer 0 of gemma4 stores is returned whole when layer 0 is dense, so layer 3 is dense with it.
    dense = [i for i in FULL_LAYERS[family] if i < dense_layers or (family == "gemma4_text" and dense_layers)]
    for layer in attached.stats()["layers"]:
        assert layer["sparse_steps"] == (0 if layer["layer"] in dense else STEPS)
        assert layer["dense"] == ({DENSE_LAYER: STEPS} if layer["layer"] in dense else {})


@pytest.mark.parametrize("family", WITH_FULL_LAYERS)
def test_below_the_budget_only_the_budget_is_read(family: str) -> None:
    model, batch, length = tiny_model(family), 2, 100
    with attnpred.attach(model, policy="ema", config=SMALL) as attached:
        greedy(model, prompt(batch, length), NEW)
    heads, blocks, attended, keys = batch * KV_HEADS.get(family, 2), 0, 0, 0
    for step, context in enumerate(range(length + 1, length + NEW)):
        recent = -(-context // 4) - (context - 8) // 4  # every block that holds one of the last 8 tokens
        chosen = 2 + 11 + recent  # sinks; 16 blocks of budget, less 2 sinks and 3 recent ones
        blocks += chosen
        attended += chosen * 4 - (-context % 4)
        keys += context * HEAD_BYTES // 2 if step % 5 == 4 else 0  # a calibration row
    layers = attached.stats()["layers"]
    assert [layer["layer"] for layer in layers] == list(FULL_LAYERS[family])
    for layer in layers:
        assert layer["sparse_steps"] == layer["steps"] == STEPS and layer["dense"] == {}
        assert layer["tokens_attended"] == attended / STEPS <= 64
        assert layer["bytes_read"] == blocks * 4 * HEAD_BYTES * heads
        assert layer["calibration_bytes"] == keys * heads
        assert layer["full_bytes"] == sum(range(length + 1, length + NEW)) * HEAD_BYTES * heads


def test_a_shared_kv_layer_of_gemma4_makes_its_own_sparse_steps() -> None:
    """Layer 3 stores nothing: other blocks than those of layer 0 must be served from what layer 0 stores."""
    model = tiny_model("gemma4_text")
    with attnpred.attach(model, policy="ema", config=SMALL) as attached:
        cache = attached.new_cache()
        greedy(model, prompt(1, 100), NEW, cache=cache)
    selections = {i: cache.decoders[i].pending[1].sort(-1).values for i in (0, 3)}  # type: ignore[index]
    assert cache.get_seq_length() == 100 + STEPS
    assert [layer["sparse_steps"] for layer in cache.stats()["layers"]] == [STEPS, STEPS]
    assert selections[0].shape == selections[3].shape and not torch.equal(selections[0], selections[3])


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_logits_of_the_last_tokens_alone_are_stock_logits(family: str) -> None:
    """As assisted decoding asks for them. Layers that share keys (gemma4) then see the last queries of a prompt alone."""
    model = tiny_model(family)
    want = model(prompt(2, 60), logits_to_keep=5).logits
    with attnpred.attach(model, policy="ema", config=SMALL) as attached:
        for cache in (attached.new_cache(), None):
            got = model(prompt(2, 60), logits_to_keep=5, cache=cache, use_cache=cache is not None).logits
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_an_attached_model_with_a_static_cache_gives_stock_tokens(family: str) -> None:
    """The caller's choice: keys then have room behind the last one, which nothing must attend to."""
    model = tiny_model(family)
    with attnpred.attach(model, policy="ema", config=SMALL):
        got = greedy_logits(model, prompt(2, 60), NEW, cache_implementation="static")
    assert_same(got, stock(family))


def test_a_model_of_sliding_layers_alone_is_left_as_it_is_with_one_warning(caplog: pytest.LogCaptureFixture) -> None:
    model, expected = tiny_model("mistral-sliding"), stock("mistral-sliding")[0]
    with caplog.at_level(logging.WARNING, "attnpred"), attnpred.attach(model, policy="ema", config=SMALL) as attached:
        for _ in range(2):
            assert torch.equal(greedy(model, prompt(2, 60), NEW), expected)
    assert attached.stats()["layers"] == [] and attached.stats()["total"]["steps"] == 0
    assert [record.getMessage() for record in caplog.records] == [
        "mistral has no full-attention layer: there is nothing to compress"
    ]


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_selecting_per_query_head_agrees_and_reads_more(family: str) -> None:
    model = tiny_model(family)
    settings = replace(COVERING, per_query_head=True)
    with attnpred.attach(model, policy="ema", config=settings) as attached:
        got = greedy_logits(model, prompt(2, 60), NEW)
    assert_same(got, stock(family))
    by_query_head = attached.stats()["total"]["bytes_read"]
    with attnpred.attach(model, policy="ema", config=COVERING) as attached:
        greedy(model, prompt(2, 60), NEW)
    assert by_query_head == 2 * attached.stats()["total"]["bytes_read"]
