"""Weights that were packed lie in a file meanwhile: less memory, the same numbers for whoever looks, all of them back."""

import copy
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

import attnpred
from attnpred.errors import ConfigError, StoreError
from attnpred.hf import pack_weights
from attnpred.hf.weights import hash_samples
from tests.hf.support import SMALL, greedy
from tests.models import prompt, tiny_model

pytest.importorskip("numba")
TOKENS = prompt(1, 100)


@pytest.fixture(autouse=True)
def own_cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path


def numbers(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: x.clone() for name, x in model.state_dict().items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_numbers_are_the_same_meanwhile_and_afterwards(dtype: torch.dtype, own_cache_folder: Path) -> None:
    model = copy.deepcopy(tiny_model("llama")).to(dtype)
    before, mark = numbers(model), hash_samples(model)
    with attnpred.attach(model, config=SMALL, weights="int8"):
        wanted, packed = greedy(model, TOKENS, 8), hash_samples(model)
    places = [layer.weight.data_ptr() for layer in model.modules() if isinstance(layer, nn.Linear)]
    with attnpred.attach(model, config=SMALL, weights="int8", originals="disk") as attached:
        assert torch.equal(greedy(model, TOKENS, 8), wanted) and hash_samples(model) == packed
        assert attached.stats()["weights"]["originals"] == 0
        moved = [layer.weight.data_ptr() for layer in model.modules() if isinstance(layer, nn.Linear)]
        assert all(a != b for a, b in zip(places, moved, strict=True))
        assert not list((own_cache_folder / "attnpred" / "kv").iterdir())  # it has no name
        copied = copy.deepcopy(model)
        for name, x in numbers(model).items():
            assert torch.equal(x, before[name]) and torch.equal(x, copied.state_dict()[name])
    assert hash_samples(model) == mark
    for name, x in model.state_dict().items():
        assert torch.equal(x, before[name])
    greedy(model, TOKENS, 2)


def test_an_embedding_that_is_the_head_too_stays_in_memory() -> None:
    model = copy.deepcopy(tiny_model("llama"))
    model.config.tie_word_embeddings = True
    model.lm_head.weight = model.model.embed_tokens.weight
    with pack_weights(model, "int8", "disk") as packing:
        assert packing.stats()["originals"] == model.lm_head.weight.nbytes


def held(kind: str) -> int:
    """Return bytes of memory of this process, of a kind of /proc/self/status."""
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        if line.startswith(kind):
            return int(line.split()[1]) * 1024
    raise AssertionError(kind)


def large() -> PreTrainedModel:
    """Return a model of 64 MiB of linear layers and little else."""
    sizes = {"hidden_size": 1024, "intermediate_size": 2048, "num_hidden_layers": 2, "head_dim": 64, "vocab_size": 97}
    heads = {"num_attention_heads": 8, "num_key_value_heads": 4}
    config = AutoConfig.for_model("llama", **sizes, **heads)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="asks Linux what is held")
def test_memory_is_that_of_the_packed_weights() -> None:
    model = large()
    linear = sum(layer.weight.nbytes for layer in model.modules() if isinstance(layer, nn.Linear))
    before = held("RssAnon")
    with pack_weights(model, "int8", "disk") as packing:
        assert packing.stats()["bytes"] < 0.27 * linear  # of 4 bytes, one and a sixteenth
        assert held("RssAnon") - before < packing.stats()["bytes"] - 0.9 * linear
    assert held("RssAnon") - before > -0.1 * linear


def test_where_no_file_can_be_made_all_is_as_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    model = copy.deepcopy(tiny_model("llama"))
    before = numbers(model)
    with pytest.raises(StoreError, match="expected room for the weights: leave originals out"):
        attnpred.attach(model, config=SMALL, weights="int8", originals="disk")
    assert "forward" not in vars(model.lm_head) and "generate" not in vars(model)
    for name, x in model.state_dict().items():
        assert torch.equal(x, before[name])


def test_places_that_make_no_sense_are_refused() -> None:
    model = tiny_model("llama")
    with pytest.raises(ConfigError, match="got originals='cpu', expected 'disk', or None for memory"):
        attnpred.attach(model, weights="int8", originals="cpu")
    for weights in (None, "float"):
        with pytest.raises(ConfigError, match="which reads the originals, expected int8 or int4: leave it out"):
            attnpred.attach(model, weights=weights, originals="disk")
