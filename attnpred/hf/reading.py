"""`Reading`: what a prompt was for the attention of every layer, kept, so that other policies can take it in unread.

A prompt's attention is dense whatever the policy, so its queries, keys and values are the same for all of them. To compare
policies on one text, the model reads it once; each further cache is filled from the reading, and its policy shown the same
queries in the same order. What comes out is what reading again would give, bit by bit (a test holds that).
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor

from attnpred.hf.layer import TieredLayer
from attnpred.kernels.dense import AttentionTerms

if TYPE_CHECKING:
    from attnpred.hf.cache import TieredCache

KEPT: ContextVar["Reading | None"] = ContextVar("attnpred_reading", default=None)
"""The reading that the prompt of this thread is kept in, if it is."""


class Seen(NamedTuple):
    """One layer's prompt: query [B, Hq, L, D], key and value [B, Hkv, L, D], allowed [B, L, L] or None (causal); output
    [B, Hq, R, D] of its last queries."""

    layer: int
    query: Tensor
    key: Tensor
    value: Tensor
    terms: AttentionTerms
    allowed: Tensor | None
    output: Tensor


@dataclass(slots=True)
class Reading:
    """Filled while `kept` runs. stock: the layers that are not ours (sliding windows), as they were after the prompt."""

    tokens: Tensor
    layers: list[Seen] = field(default_factory=list)
    stock: dict[int, Any] = field(default_factory=dict)

    def bytes(self) -> int:
        """Return what is held, but for stock layers."""
        return sum(part.nbytes for seen in self.layers for part in (seen.query, seen.key, seen.value))

    @contextmanager
    def kept(self, cache: "TieredCache") -> Iterator[None]:
        """Keep the prompt that `cache`, which is empty, is given meanwhile."""
        token = KEPT.set(self)
        try:
            yield
        finally:
            KEPT.reset(token)
        for index, layer in enumerate(cache.layers):
            if type(layer) is not TieredLayer:
                self.stock[index] = copy.deepcopy(layer)

    def fill(self, cache: "TieredCache") -> None:
        """Give `cache`, which is empty and attached, what the prompt would have given it."""
        for seen in self.layers:
            layer = cache.layer_of(seen.layer, *self._updated(cache, seen))
            decoder = cache.decoder(seen.layer)
            if layer is not None and not cache.settings.is_dense_layer(seen.layer):
                if decoder.policy.reads_tokens:
                    decoder.memory.read(self.tokens, layer.store.length)
                decoder.observe(
                    seen.query, layer.store, seen.terms, seen.allowed, prompt=True, keys=seen.key, output=seen.output
                )
        for index, stock in self.stock.items():
            cache.layers[index] = copy.deepcopy(stock)

    @staticmethod
    def _updated(cache: "TieredCache", seen: Seen) -> tuple[Tensor, Tensor]:
        """Return the keys and values as the model's attention gets them; a layer that shares keys has them already."""
        own = cache.layers[seen.layer] if seen.layer < len(cache.layers) else None
        if type(own) is TieredLayer:
            return cache.update(seen.key, seen.value, seen.layer)
        return seen.key, seen.value
