"""Under autocast (and accelerate's mixed precision): stock tokens with a full budget, and sparse steps with a small one."""

import copy
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import attnpred
from attnpred.errors import TierFullError
from attnpred.hf import cache_argument
from attnpred.hf.sizes import estimate_for
from attnpred.policies import POLICIES
from attnpred.predictor.pretrained import Predictor, PredictorConfig
from tests.hf.support import COVERING, SMALL, WHOLE, greedy, offloaded, predictor, separators
from tests.models import FAMILIES, prompt, tiny_model

NEW = 4
HALVES = (torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.slow))


def autocast(dtype: torch.dtype) -> torch.autocast:
    return torch.autocast("cpu", dtype)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("policy", POLICIES)
def test_every_policy(policy: str, dtype: torch.dtype) -> None:
    model, tokens = tiny_model("llama"), prompt(1, 90)
    with autocast(dtype):
        want = greedy(model, tokens, NEW)
        with attnpred.attach(model, policy=separators(policy), config=WHOLE):
            assert torch.equal(greedy(model, tokens, NEW), want)
        with attnpred.attach(model, policy=separators(policy), config=SMALL) as attached:
            greedy(model, tokens, NEW)
    layers = attached.stats()["layers"]
    assert policy in ("full", "pod") or all(layer["sparse_steps"] == NEW - 1 for layer in layers)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family(family: str) -> None:
    model, tokens = tiny_model(family), prompt(2, 60)
    with autocast(torch.bfloat16):
        want = greedy(model, tokens, NEW)
        with attnpred.attach(model, policy="ema", config=WHOLE):
            assert torch.equal(greedy(model, tokens, NEW), want)


@pytest.mark.parametrize("offload", [None, "cpu", "disk"])
def test_a_cache_holds_what_stock_attention_would_attend_to(offload: str | None, tmp_path: Path) -> None:
    """Half the bytes of the fp32 model's own cache, of which a call without autocast makes no other."""
    model, tokens = tiny_model("llama"), prompt(1, 90)
    with attnpred.attach(model, policy="ema", config=offloaded(COVERING, offload, tmp_path)) as attached:
        with autocast(torch.bfloat16):
            want = greedy(model, tokens, NEW)
            with attached.new_cache() as cache:
                assert torch.equal(greedy(model, tokens, NEW, cache=cache), want)
        with attached.new_cache() as plain:
            greedy(model, tokens, NEW, cache=plain)
            half, whole = cache.stats()["total"]["full_bytes"], plain.stats()["total"]["full_bytes"]
            assert 2 * half == whole > 0


@pytest.mark.parametrize("first", [True, False])
@torch.no_grad()
def test_autocast_may_begin_or_end_between_two_calls(first: bool) -> None:
    model, tokens = tiny_model("llama"), prompt(1, 90)
    with attnpred.attach(model, policy="ema", config=SMALL) as attached:
        cache = attached.new_cache()
        with torch.autocast("cpu", torch.bfloat16, enabled=first):
            model(tokens[:, :80], **cache_argument(cache))
        with torch.autocast("cpu", torch.bfloat16, enabled=not first):
            model(tokens[:, 80:89], **cache_argument(cache))
            logits = model(tokens[:, 89:], **cache_argument(cache)).logits
    assert cache.stats()["total"]["sparse_steps"] == 3 and bool(logits.isfinite().all())


def test_beams_and_a_half_precision_model_under_the_other_half() -> None:
    # With torch 2.6 steps are a rounding of bf16 apart, so the prompt is one whose beams are never as close as that.
    model, tokens = copy.deepcopy(tiny_model("llama")).half(), prompt(2, 90, seed=1)
    with autocast(torch.bfloat16):
        want = greedy(model, tokens, NEW, num_beams=2)
        for policy in ("predicted", "h2o"):
            with attnpred.attach(model, policy=separators(policy), config=WHOLE):
                assert torch.equal(greedy(model, tokens, NEW, num_beams=2), want)
            with attnpred.attach(model, policy=separators(policy), config=SMALL, offload="cpu"):
                greedy(model, tokens, NEW, num_beams=2)


def test_a_saved_cache_goes_on(tmp_path: Path) -> None:
    model, tokens = tiny_model("llama"), prompt(1, 90)
    with autocast(torch.bfloat16), attnpred.attach(model, policy="ema", config=SMALL) as attached:
        cache = attached.new_cache()
        first = greedy(model, tokens, NEW, cache=cache)
        cache.save(tmp_path / "a.kv")
        loaded = attnpred.TieredCache.load(tmp_path / "a.kv", model)
        again = [greedy(model, first, NEW, cache=one) for one in (cache, loaded)]
    assert torch.equal(*again)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("kind", ["cnn", "seer-gate"])
def test_a_predictor_may_be_made_inside(kind: str, dtype: torch.dtype) -> None:
    sizes = {"group": 2, "head_dim": 8, "rank": 8} if kind == "seer-gate" else {}
    with autocast(dtype):
        made = Predictor(PredictorConfig(kind, SMALL.block_size, **sizes))
    assert {name: x.dtype for name, x in made.network.state_dict().items()} == {
        name: x.dtype for name, x in predictor(kind).network.state_dict().items()
    }


def test_accelerates_mixed_precision() -> None:
    accelerate = pytest.importorskip("accelerate")
    model, tokens = copy.deepcopy(tiny_model("llama")), prompt(1, 90)
    model = accelerate.Accelerator(cpu=True, mixed_precision="bf16").prepare_model(model)
    want = greedy(model, tokens, NEW)
    with attnpred.attach(model, policy="ema", config=WHOLE):
        assert torch.equal(greedy(model, tokens, NEW), want)
    with attnpred.attach(model, policy="ema", config=SMALL) as attached:
        greedy(model, tokens, NEW)
    assert attached.stats()["total"]["sparse_steps"] == 3 * (NEW - 1)


def test_what_is_admitted_is_what_will_be_held() -> None:
    """Half of what the fp32 model would take without autocast."""
    model, tokens = tiny_model("llama"), prompt(1, 90)
    settings = replace(SMALL, offload="cpu")
    needed = estimate_for(model.config, settings, POLICIES["ema"](), torch.bfloat16, 90 + NEW).fast
    with attnpred.attach(model, policy="ema", config=replace(settings, fast_limit=needed * 3 // 2)):
        with autocast(torch.bfloat16):
            greedy(model, tokens, NEW)
        with pytest.raises(TierFullError, match="fast_limit"):
            greedy(model, tokens, NEW)
