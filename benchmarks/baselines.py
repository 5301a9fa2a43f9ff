"""What decode steps are held against: a model without attention, and the fastest attention that stock torch has.

floor    the attention function gives the query back, and the cache keeps nothing: projections, MLPs, norms and the
         rest of the step stay as they are
packed   a cache with room for all tokens, written in place, and SDPA with the query heads of a group as its queries
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention as sdpa
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import attnpred
from attnpred.config import CacheConfig
from attnpred.hf import TieredCache
from attnpred.hf.cache import IMPLEMENTATION

FLOOR, PACKED = "benchmark_floor", "benchmark_packed"


def floor_attention(module: nn.Module, query: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, None]:
    """Return the query in place of the attention output."""
    return query.transpose(1, 2), None


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attend with one query per row: [B, Hq, 1, D] to [B, 1, Hq, D]."""
    batch, heads, _, dim = query.shape
    grouped = query.view(batch, key.shape[1], heads // key.shape[1], dim)
    output = sdpa(grouped, key, value, attn_mask=attention_mask, scale=scaling)
    return output.reshape(batch, 1, heads, -1), None


class FloorLayer(DynamicLayer):
    """Keeps nothing but the length."""

    def __init__(self) -> None:
        super().__init__()
        self.length = 0

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        self.length += key_states.shape[2]
        self.is_initialized = True
        return key_states, value_states

    def get_seq_length(self) -> int:
        return self.length

    def batch_repeat_interleave(self, repeats: int) -> None:
        pass


class PackedLayer(DynamicLayer):
    """Keys and values in tensors with room for `capacity` tokens."""

    def __init__(self, capacity: int) -> None:
        super().__init__()
        self.capacity, self.length = capacity, 0

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.keys, self.values = (
                x.new_zeros(*x.shape[:2], self.capacity, x.shape[3]) for x in (key_states, value_states)
            )
            self.is_initialized = True
        first, self.length = self.length, self.length + key_states.shape[2]
        self.keys[:, :, first : self.length] = key_states
        self.values[:, :, first : self.length] = value_states
        return self.keys[:, :, : self.length], self.values[:, :, : self.length]

    def get_seq_length(self) -> int:
        return self.length

    def batch_repeat_interleave(self, repeats: int) -> None:
        self.keys, self.values = (x.repeat_interleave(repeats, 0) for x in (self.keys, self.values))


def floor_cache(layers: int) -> Cache:
    """Return the cache of `floor`."""
    return Cache(layers=[FloorLayer() for _ in range(layers)])


def packed_cache(layers: int, capacity: int) -> Cache:
    """Return the cache of `packed`."""
    return Cache(layers=[PackedLayer(capacity) for _ in range(layers)])


@contextmanager
def registered() -> Iterator[None]:
    """Have transformers know the attention functions of both."""
    for name, function in ((FLOOR, floor_attention), (PACKED, packed_attention)):
        ALL_ATTENTION_FUNCTIONS[name] = function
        ALL_MASK_ATTENTION_FUNCTIONS[name] = sdpa_mask
    try:
        yield
    finally:
        for name in (FLOOR, PACKED):
            del ALL_ATTENTION_FUNCTIONS[name]
            del ALL_MASK_ATTENTION_FUNCTIONS[name]


class Variant(NamedTuple):
    """A way to decode: the attention that the model is switched to, and a cache of its own."""

    name: str
    implementation: str
    cache: Cache


def make_variants(
    model: Any, names: Sequence[str], capacity: int, settings: CacheConfig, policies: Sequence[str] = ()
) -> list[Variant]:
    """Return variants with empty caches: floor, transformers, packed, dense, predicted, fits, and any policy by its name.

    `fits` is `predicted` with a budget that holds the whole context, as `attach` leaves it for short texts.
    """
    config, stock = model.config, "sdpa"

    def tiered(policy: str, chosen: CacheConfig) -> Cache:
        return TieredCache(config, policy=policy, config=chosen)

    makers: dict[str, tuple[str, Callable[[], Cache]]] = {
        "floor": (FLOOR, lambda: floor_cache(config.num_hidden_layers)),
        "transformers": (stock, lambda: DynamicCache(config=config)),
        "packed": (PACKED, lambda: packed_cache(config.num_hidden_layers, capacity)),
        "dense": (IMPLEMENTATION, lambda: tiered("full", settings)),
        "predicted": (IMPLEMENTATION, lambda: tiered("predicted", settings)),
        "fits": (IMPLEMENTATION, lambda: tiered("predicted", replace(settings, budget=1.0))),
    }
    makers |= {name: (IMPLEMENTATION, lambda name=name: tiered(name, settings)) for name in policies}  # type: ignore[misc]
    return [Variant(name, makers[name][0], makers[name][1]()) for name in (*names, *policies)]


@contextmanager
def switchable(model: Any) -> Iterator[None]:
    """Have transformers know all attention functions while this lasts; the model is given back as it was."""
    before = model.config._attn_implementation
    with attnpred.attach(model, policy="full"), registered():
        try:
            yield
        finally:
            model.set_attn_implementation(before)


@torch.no_grad()
def step(model: Any, variant: Variant, tokens: Tensor, **kwargs: Any) -> tuple[float, Tensor]:
    """Give the model `tokens` [B, T]; return milliseconds, and the logits of the last [B, vocabulary]."""
    if model.config._attn_implementation != variant.implementation:
        model.set_attn_implementation(variant.implementation)
    began = time.perf_counter()
    found = model(tokens, cache=variant.cache, use_cache=True, logits_to_keep=1, **kwargs)
    return (time.perf_counter() - began) * 1e3, found.logits[:, -1]
