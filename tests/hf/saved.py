"""Caches to be saved and loaded, and what the tiny models say after each call."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

import attnpred
from attnpred.config import CacheConfig
from attnpred.hf import TieredCache
from attnpred.policies import POLICIES
from attnpred.predictor.pretrained import Predictor, PredictorConfig
from tests.hf.support import SMALL, predictor, separators
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
        config=settings,
        predictor=predictor_of(policy),
    )
    logits(cache, prompt(batch, LENGTH), *singles(3, batch, 10))
    cache.save(path, **more)
    return cache


def load(path: Path, policy: str = "ema", **more: Any) -> TieredCache:
    return TieredCache.load(path, tiny_model("llama"), predictor=predictor_of(policy), **more)


def small_model(**changes: Any) -> PreTrainedModel:
    """Return a model like the tiny one, but for `changes` of its config."""
    config = LlamaConfig(**(tiny_model("llama").config.to_dict() | changes))
    return AutoModelForCausalLM.from_config(config, dtype=changes.get("dtype", torch.float32))  # type: ignore[no-any-return]
