"""`torch.set_default_device` and `torch.set_default_dtype` are the user's: whatever they say, the same tokens."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

import attnpred
from attnpred.config import CacheConfig
from attnpred.policies import POLICIES
from attnpred.predictor.pretrained import Predictor, PredictorConfig
from tests.hf.support import SMALL, greedy, offloaded, predictor, separators
from tests.models import prompt, tiny_model

NEW, TOKENS = 4, prompt(2, 90)


@contextmanager
def default(setting: str | torch.dtype) -> Iterator[None]:
    """Make a device or a type of number torch's default; on "meta" nothing has a value.

    `with torch.device` does what `torch.set_default_device` does, which torch 2.6 cannot take back: after
    `set_default_device(None)` its `get_default_device` fails, and so does every `from_pretrained`.
    """
    if isinstance(setting, str):
        with torch.device(setting):
            yield
        return
    try:
        torch.set_default_dtype(setting)
        yield
    finally:
        torch.set_default_dtype(torch.float32)


def tokens(policy: str, config: CacheConfig, beams: int = 1) -> torch.Tensor:
    model = tiny_model("llama")
    with attnpred.attach(model, policy=separators(policy), config=config) as attached:
        result = greedy(model, TOKENS, NEW, num_beams=beams)
        assert policy in ("full", "pod") or attached.stats()["total"]["sparse_steps"] == 3 * (NEW - 1)
    return result


@pytest.mark.parametrize("setting", ["meta", torch.float64])
@pytest.mark.parametrize("policy", POLICIES)
def test_every_policy(policy: str, setting: str | torch.dtype) -> None:
    want = tokens(policy, SMALL)
    with default(setting):
        assert torch.equal(tokens(policy, SMALL), want)


@pytest.mark.parametrize("setting", ["meta", torch.float64])
@pytest.mark.parametrize("policy", ["ema", "predicted"])
def test_a_slow_tier_and_a_file(policy: str, setting: str | torch.dtype, tmp_path: Path) -> None:
    model, config = tiny_model("llama"), offloaded(SMALL, "disk", tmp_path)
    beams = 1 if setting == "meta" else 2  # transformers' own beams make tensors on the default device
    want = tokens(policy, SMALL, beams)
    with default(setting):
        assert torch.equal(tokens(policy, config, beams), want)
        with attnpred.attach(model, policy=separators(policy), config=config) as attached:
            with attached.new_cache() as cache:
                first = greedy(model, TOKENS[:1], NEW, cache=cache)
                cache.save(tmp_path / "a.kv")
                second = greedy(model, first, NEW, cache=cache)
            with attnpred.TieredCache.load(tmp_path / "a.kv", model) as loaded:
                assert torch.equal(greedy(model, first, NEW, cache=loaded), second)


@pytest.mark.parametrize("setting", ["meta", torch.float64])
@pytest.mark.parametrize("kind", ["cnn", "seer-gate"])
def test_a_predictor_is_made_saved_and_loaded(kind: str, setting: str | torch.dtype, tmp_path: Path) -> None:
    sizes = {"group": 2, "head_dim": 8, "rank": 8} if kind == "seer-gate" else {}
    with default(setting):
        made = Predictor(PredictorConfig(kind, SMALL.block_size, **sizes))
        loaded = Predictor.from_pretrained(made.save_pretrained(tmp_path))
    known = predictor(kind).network.state_dict()
    for name, tensor in loaded.network.state_dict().items():
        assert (tensor.device.type, tensor.dtype) == ("cpu", known[name].dtype)
