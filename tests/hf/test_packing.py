"""Packed weights: the attached model is the packed model, and the model comes back bit for bit, however it ends."""

import copy
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

import attnpred
from attnpred.errors import CacheFileError, ConfigError, UnsupportedModelError
from attnpred.hf import TieredCache, load_model, pack_weights
from attnpred.hf.weights import hash_samples
from attnpred.kernels.linear import BITS, pack, unpack
from tests.hf.support import COVERING, SMALL, greedy
from tests.models import prompt, tiny_model

pytest.importorskip("numba")
TOKENS = prompt(2, 100)


@pytest.fixture
def model() -> PreTrainedModel:
    return cast(PreTrainedModel, tiny_model.__wrapped__("llama"))  # no hooks that another test has left


def state(model: nn.Module) -> tuple[Any, ...]:
    held = {name: (id(x), x._version, x.clone()) for name, x in model.state_dict(keep_vars=True).items()}
    return [sorted(vars(module)) for module in model.modules()], held


def assert_same(one: tuple[Any, ...], other: tuple[Any, ...]) -> None:
    assert one[0] == other[0] and one[1].keys() == other[1].keys()
    for a, b in zip(one[1].values(), other[1].values(), strict=True):
        assert a[:2] == b[:2] and torch.equal(a[2], b[2])


def stands_for(model: PreTrainedModel, kind: str) -> PreTrainedModel:
    """Return the model that has the numbers for which its packed weights stand."""
    made = copy.deepcopy(model)
    for layer in made.modules():
        if isinstance(layer, nn.Linear):
            bits = 8 if layer is made.lm_head else BITS[kind]
            layer.weight = nn.Parameter(unpack(pack(layer.weight, bits), dtype=layer.weight.dtype))
    return made


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma2", "gpt_neox", "phi3"])
@pytest.mark.parametrize("kind", BITS)
def test_a_packed_model_is_that_of_its_rounded_weights(family: str, kind: str) -> None:
    model = copy.deepcopy(tiny_model(family))
    wanted = stands_for(model, kind)
    with pack_weights(model, kind) as packing, torch.no_grad():
        for tokens in (TOKENS[:, :1], TOKENS[:1, :7], TOKENS[:, :12], TOKENS):  # one row of input to many
            found, exact = model(tokens).logits, wanted(tokens).logits
            assert (found - exact).norm() < 1e-3 * exact.norm()
        linear = sum(isinstance(module, nn.Linear) for module in model.modules())
        assert packing.stats()["layers"] == linear > 3 and packing.stats()["left"] == {}


@pytest.mark.parametrize("kind", [*BITS, "float"])
def test_attached_at_full_budget_it_says_what_it_says_without(kind: str, model: PreTrainedModel) -> None:
    stock = greedy(model, TOKENS, 16)
    with pack_weights(model, kind):
        packed = greedy(model, TOKENS, 16)
    with attnpred.attach(model, policy="ema", config=COVERING, weights=kind) as attached:
        assert torch.equal(greedy(model, TOKENS, 16), packed)
        assert attached.stats()["weights"]["kind"] == kind and attached.stats()["total"]["sparse_steps"] > 0
    assert torch.equal(greedy(model, TOKENS, 16), stock)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_as_they_are_take_no_memory_and_give_the_same_numbers(dtype: torch.dtype) -> None:
    model = copy.deepcopy(tiny_model("qwen2")).to(dtype)
    mark = hash_samples(model)
    with torch.no_grad():
        for tokens in (TOKENS[:, :1], TOKENS[:, :40], TOKENS):
            stock = model(tokens).logits.float()
            with pack_weights(model, "float") as packing:
                found = model(tokens).logits.float()
                assert hash_samples(model) == mark and packing.stats()["bytes"] == 0
            assert (found - stock).norm() < (1e-5 if dtype == torch.float32 else 2e-2) * stock.norm()


def test_the_model_comes_back_however_it_ends(model: PreTrainedModel) -> None:
    before = state(model)
    with attnpred.attach(model, policy="ema", config=SMALL, weights="int8"):
        greedy(model, TOKENS, 4)
    assert_same(state(model), before)
    with pytest.raises(KeyError), attnpred.attach(model, policy="ema", config=SMALL, weights="int4"):
        raise KeyError
    assert_same(state(model), before)
    attached = attnpred.attach(model, policy="ema", config=SMALL, weights="int8")
    attached.detach()
    attached.detach()
    assert_same(state(model), before)


def test_what_fails_on_the_way_leaves_the_model_alone(model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    before = state(model)

    def fail(*given: Any) -> None:
        raise KeyError

    monkeypatch.setattr("attnpred.hf.handle.watch", fail)
    with pytest.raises(KeyError):
        attnpred.attach(model, policy="ema", config=SMALL, weights="int8")
    monkeypatch.undo()
    model.set_attn_implementation("sdpa")
    vars(model).pop("generate", None)
    assert_same(state(model), before)


def test_what_is_no_plain_linear_layer_is_left_and_counted() -> None:
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model("gpt2", n_embd=32, n_layer=2, n_head=4, vocab_size=97, n_positions=128)
    ).eval()
    with pack_weights(model, "int8") as packing, torch.no_grad():
        assert packing.stats()["left"] == {"Conv1D": 8} and packing.stats()["layers"] == 1
        model(TOKENS)
    llama = copy.deepcopy(tiny_model("llama"))
    layer = next(module for module in llama.modules() if isinstance(module, nn.Linear))
    layer.forward = layer.forward  # as somebody does who puts a clock around it
    with pack_weights(llama, "int8") as packing:
        assert packing.stats()["left"] == {"hooked Linear": 1}
    assert "forward" in vars(layer)


def test_what_cannot_be_packed_is_refused_in_a_line(model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    before = state(model)

    def refused(error: type[Exception], text: str, kind: str = "int8") -> None:
        with pytest.raises(error, match=text):
            attnpred.attach(model, policy="ema", config=SMALL, weights=kind)

    refused(ConfigError, "got weights='int3', expected one of 'int8', 'int4', 'float', or None", "int3")
    model.train()
    refused(UnsupportedModelError, r"got weights='int8' for a model in training mode, expected model.eval\(\)")
    model.eval()
    with pack_weights(model, "int8"):
        refused(ConfigError, "whose weights are packed already")
    model.config.quantization_config = {"quant_method": "x"}
    refused(UnsupportedModelError, "got weights='int8' for a quantized model, expected plain weights")
    del model.config.quantization_config
    monkeypatch.setattr("attnpred.hf.packing.DIGEST", "torch")
    refused(ImportError, "got no module 'numba', expected it installed")
    monkeypatch.undo()
    assert_same(state(model), before)
    model.half()
    refused(UnsupportedModelError, "got weights='int8' for weights in float16, expected float32 or bfloat16")
    model.to("meta")
    refused(UnsupportedModelError, "got weights='int8' for weights on meta, expected all on the CPU")


def test_gradients_and_changed_weights_are_refused(model: PreTrainedModel) -> None:
    with pack_weights(model, "int8"):
        with pytest.raises(ConfigError, match=r"got a call that records gradients.*torch.no_grad\(\)"):
            model(TOKENS)
        with torch.no_grad():
            model(TOKENS)
            model.lm_head.weight.mul_(2)
            with pytest.raises(ConfigError, match="got weights that were changed after they were packed"):
                model(TOKENS)


def test_an_input_that_is_changed_between_projections_is_seen(model: PreTrainedModel) -> None:
    attention, x = model.model.layers[0].self_attn, torch.randn(1, 1, 32)
    with pack_weights(model, "int8"), torch.no_grad():
        one = attention.k_proj(x)
        attention.q_proj(x)
        x.mul_(2)
        assert torch.allclose(attention.k_proj(x), 2 * one, rtol=1e-4, atol=1e-4)
        with torch.inference_mode():
            y = x.clone()
            attention.q_proj(y)
            y.mul_(2)
            assert torch.allclose(attention.k_proj(y), 4 * one, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_types_of_number_are_those_of_the_layer(dtype: torch.dtype) -> None:
    model = copy.deepcopy(tiny_model("llama")).to(dtype)
    with pack_weights(model, "int8"), torch.no_grad():
        for tokens in (TOKENS[:, :1], TOKENS):
            assert model(tokens).logits.dtype == dtype
            with torch.autocast("cpu", torch.bfloat16):
                assert model.lm_head(torch.randn(1, tokens.shape[1], 32, dtype=dtype)).dtype == torch.bfloat16


def test_copies_are_plain_and_files_hold_the_original(model: PreTrainedModel, tmp_path: Path) -> None:
    stock = greedy(model, TOKENS, 8)
    with attnpred.attach(model, policy="ema", config=SMALL, weights="int4"):
        copied = copy.deepcopy(model)
        model.save_pretrained(tmp_path)
        with pytest.raises(ConfigError, match="got packed weights to pickle"):
            torch.save(model.model.layers[0], tmp_path / "layer")
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.equal(greedy(copied, TOKENS, 8), stock) and torch.equal(greedy(again, TOKENS, 8), stock)


def test_a_saved_cache_knows_the_weights_it_came_from(model: PreTrainedModel, tmp_path: Path) -> None:
    file = tmp_path / "cache.kv"
    marks = [hash_samples(model)]
    with attnpred.attach(model, policy="ema", config=SMALL, weights="int8") as attached:
        cache = attached.new_cache()
        greedy(model, TOKENS, 4, past_key_values=cache)
        cache.save(file)
        TieredCache.load(file, model)
        marks.append(hash_samples(model))
    with pytest.raises(CacheFileError, match="saved with other weights"):
        TieredCache.load(file, model)
    with pack_weights(model, "int4"):
        marks.append(hash_samples(model))
        with pytest.raises(CacheFileError, match="saved with other weights"):
            TieredCache.load(file, model)
    assert len(set(marks)) == 3 and hash_samples(model) == marks[0]


@pytest.mark.slow
def test_the_demo_model_with_a_tied_head() -> None:
    model, tokenizer = load_model("demo")
    ids = tokenizer("The old house stood on a hill, and", return_tensors="pt", verbose=False)["input_ids"]
    with attnpred.attach(model, policy="ema", config=SMALL, weights="int8") as attached, torch.no_grad():
        assert "lm_head" in dict(model.named_modules())
        assert model.lm_head.forward.kind == "int8"
        assert attached.stats()["weights"]["left"] == {}
        model(ids)
