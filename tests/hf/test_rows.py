"""Rows of different lengths, policies and budgets in one call: each says what it says alone."""

from typing import Any

import pytest
import torch

from attnpred.errors import UnsupportedModelError
from attnpred.hf import TieredCache, attach, cache_argument
from attnpred.hf.blocks import give_tokens, keeps_every_token, tokens_of
from attnpred.hf.rows import CacheRows, can_be_row
from tests.models import tiny_model

POLICIES = (("quest", 80), ("predicted", 96), ("full", 80), ("snapkv", 80), ("ema", 1.0))


def ids(length: int) -> torch.Tensor:
    return torch.randint(3, 97, (1, length), generator=torch.Generator().manual_seed(length))


@torch.no_grad()
def read(model: Any, policy: str, budget: float, length: int, offload: str | None = None) -> TieredCache:
    cache = TieredCache(model.config, policy=policy, budget=budget, recent_window=16, offload=offload)
    model(ids(length), **cache_argument(cache))
    return cache


@pytest.mark.parametrize("family", ["llama", "qwen3", "olmo2", "smollm3"])
@pytest.mark.parametrize("offload", [None, "cpu"])
@torch.no_grad()
def test_rows_are_what_they_are_alone(family: str, offload: str | None) -> None:
    model: Any = tiny_model(family)
    with attach(model, policy="full"):
        alone, rows = (
            [read(model, *chosen, 150 + 17 * i, offload) for i, chosen in enumerate(POLICIES)] for _ in range(2)
        )
        for step in range(6):
            tokens = torch.tensor([[7 + 5 * step + i] for i in range(len(rows))])
            wanted = torch.cat([model(tokens[i : i + 1], **cache_argument(one)).logits for i, one in enumerate(alone)])
            places = torch.tensor([[one.get_seq_length()] for one in rows])
            found = model(tokens, position_ids=places, **cache_argument(CacheRows(rows))).logits
            torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
        for one, other in zip(alone, rows, strict=True):
            assert one.stats()["total"]["bytes_read"] == other.stats()["total"]["bytes_read"]
            other.close()
            one.close()


def test_a_model_with_windows_has_no_rows() -> None:
    model: Any = tiny_model("gemma3_text")
    with attach(model, policy="full"), torch.no_grad():
        cache = read(model, "quest", 80, 150)
        assert not can_be_row(cache) and not keeps_every_token(cache)
        with pytest.raises(UnsupportedModelError, match="let them take turns"):
            rows = CacheRows([cache, read(model, "quest", 80, 60)])
            model(torch.tensor([[5], [6]]), position_ids=torch.tensor([[150], [60]]), **cache_argument(rows))


@pytest.mark.parametrize("family", ["llama", "qwen2"])
@torch.no_grad()
def test_tokens_go_from_one_cache_to_another(family: str) -> None:
    model: Any = tiny_model(family)
    with attach(model, policy="full"):
        first = read(model, "full", 1.0, 200)
        parts = [tokens_of(first, 0, 64), tokens_of(first, 64, 192), tokens_of(first, 192, 200)]
        second = TieredCache(model.config, policy="full")
        give_tokens(second, parts[:2], model.device)
        give_tokens(second, parts[2:], model.device)
        wanted, found = (model(torch.tensor([[5]]), **cache_argument(one)).logits for one in (first, second))
        assert torch.equal(wanted, found) and second.get_seq_length() == 201
