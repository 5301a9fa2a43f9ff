"""A cache that was filled, copied or cut under `torch.inference_mode` goes on outside of it, and the other way round."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

import attnpred
from attnpred.hf import cache_argument
from attnpred.policies import POLICIES
from tests.hf.support import SMALL, greedy, offloaded, separators
from tests.models import prompt, tiny_model

TOKENS, NEW = prompt(1, 90), 4


def tokens(policy: str, offload: str | None, folder: Path, inside: tuple[bool, bool, bool]) -> Tensor:
    """Return what three calls and two copies generate: the prompt, a chunk, and the copies are made `inside` or not."""
    model = tiny_model("llama")
    with attnpred.attach(model, policy=separators(policy), config=offloaded(SMALL, offload, folder)) as attached:
        with torch.inference_mode(inside[0]), torch.no_grad():
            cache = attached.new_cache()
            model(TOKENS[:, :80], **cache_argument(cache))
        with torch.inference_mode(inside[1]), torch.no_grad():
            model(TOKENS[:, 80:88], **cache_argument(cache))
            model(TOKENS[:, 88:89], **cache_argument(cache))
        first = greedy(model, TOKENS, NEW, cache=cache)
        with torch.inference_mode(inside[2]):
            cache.save(folder / "a.kv")
            fork = cache.fork()
            fork.batch_repeat_interleave(2)
            fork.reorder_cache(torch.tensor([1, 0]))  # type: ignore[arg-type]
            if not POLICIES[policy].evicts:  # which may have dropped what would be recent then
                cache.crop(-2)
        second = greedy(model, first, NEW, cache=cache)
        third = greedy(model, first.repeat(2, 1), NEW, cache=fork)
        cache.close()
        fork.close()
    return torch.cat([second.flatten(), third.flatten()])


@pytest.mark.parametrize("policy", POLICIES)
def test_every_policy(policy: str, tmp_path: Path) -> None:
    want = tokens(policy, None, tmp_path, (False, False, False))
    for inside in (True, False, False), (False, True, True):
        assert torch.equal(tokens(policy, None, tmp_path, inside), want)


@pytest.mark.parametrize("offload", ["cpu", "disk"])
@pytest.mark.parametrize("policy", ["ema", "predicted"])
def test_a_slow_tier(policy: str, offload: str, tmp_path: Path) -> None:
    want = tokens(policy, offload, tmp_path, (False, False, False))
    for inside in (True, False, False), (False, True, True):
        assert torch.equal(tokens(policy, offload, tmp_path, inside), want)


def test_a_file_read_inside_goes_on_outside(tmp_path: Path) -> None:
    model = tiny_model("gemma3_text")  # with sliding layers
    with attnpred.attach(model, policy="ema", config=SMALL) as attached:
        cache = attached.new_cache()
        first = greedy(model, TOKENS, NEW, cache=cache)
        cache.save(tmp_path / "a.kv")
        want = greedy(model, first, NEW, cache=cache)
        with torch.inference_mode():
            loaded = attnpred.TieredCache.load(tmp_path / "a.kv", model)
        assert torch.equal(greedy(model, first, NEW, cache=loaded), want)
        loaded.close()
