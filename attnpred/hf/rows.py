"""`CacheRows`: caches of several sequences in one call of the model, which is a decode step of each of them.

The weights are read once for all rows. Everything else is each row's own: its length, its position, its policy and budget,
and what its cache remembers; so a row says what it would say alone, but for the rounding of larger products. (`generate`
makes a batch by padding, in one cache with one policy, whose rows begin and end together.)

Masks are made for the longest row and must be None: each row attends to all that its cache holds. So all layers must be
`TieredLayer`s; a model with sliding windows takes its rows in turns.
"""

import weakref
from collections.abc import Iterator, Sequence
from typing import Any, final

from torch import Tensor
from transformers.cache_utils import Cache

from attnpred.hf.cache import LAST_UPDATED, TieredCache
from attnpred.hf.layer import TieredLayer


def can_be_row(cache: TieredCache) -> bool:
    """Return whether a cache may be one of several rows."""
    return cache.sharing is None and all(type(layer) is TieredLayer for layer in cache.layers)


@final
class CacheRows(Cache):
    """The cache argument of one call with one token of each row: `model(tokens [R, 1], position_ids=..., cache=rows)`.

    position_ids [R, 1]: how many tokens each row holds. The caches stay the caller's.
    """

    def __init__(self, caches: Sequence[TieredCache]) -> None:
        super().__init__(layers=max(caches, key=lambda cache: cache.get_seq_length()).layers)
        self.caches = list(caches)
        self._updated: list[tuple[Tensor, Tensor]] = []

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        self._updated = [
            cache.update(key_states[row : row + 1], value_states[row : row + 1], layer_idx)
            for row, cache in enumerate(self.caches)
        ]
        LAST_UPDATED.set(weakref.ref(self))
        return key_states, value_states

    def rows(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield what each row's `update` returned, its cache being the one that was updated last."""
        try:
            for cache, (key, value) in zip(self.caches, self._updated, strict=True):
                LAST_UPDATED.set(weakref.ref(cache))
                yield key, value
        finally:
            LAST_UPDATED.set(weakref.ref(self))
