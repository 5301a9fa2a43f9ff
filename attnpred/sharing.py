"""PoD in a cache: which layers share the keys of distant tokens, their stores, and a dense call of one of them.

What it computes is in `attnpred.kernels.shared`, where the keys lie in `attnpred.store.shared`. A layer that neither
follows another nor is asked by one for its distant log-sum-exp (the gate) is none of this module's business: it keeps an
ordinary store and the ordinary attention, so that groups of one layer each change nothing at all.

Where the policy evicts, a layer that others follow has a `SharedPool` too: it keeps the keys that they need.
"""

from collections.abc import Mapping
from typing import final

import torch
from torch import Tensor

from attnpred.config import CacheConfig
from attnpred.errors import closed_cache
from attnpred.kernels.dense import AttentionTerms
from attnpred.kernels.shared import Part, Shared, Split, shared_attention
from attnpred.store.evicting import EvictingPool
from attnpred.store.pool import BlockPool
from attnpred.store.shared import SharedPool
from attnpred.telemetry import LayerCounts


@final
class Sharing:
    """leaders: for each layer that takes part, per kv head, the layer whose distant keys it uses (its own included).

    evicts: blocks that are not chosen are freed.
    """

    def __init__(self, leaders: Mapping[int, tuple[int, ...]], config: CacheConfig, *, evicts: bool = False) -> None:
        self.leaders, self.config, self.evicts = dict(leaders), config, evicts
        self.followed = {found for layer, heads in self.leaders.items() for found in heads if found != layer}
        self.split = Split(config.own_sinks, config.own_recent)
        self.asked = {
            (found, head)
            for layer, heads in self.leaders.items()
            for head, found in enumerate(heads)
            if found != layer and config.distant_gate is not None
        }
        self.stores: dict[int, BlockPool | EvictingPool | SharedPool] = {}
        self.distant: dict[int, Tensor] = {}  # of layers that are asked, in the present call: [B, Hq, Q]

    def new_store(self, layer: int) -> BlockPool | EvictingPool | SharedPool:
        """Return the store of `layer`; those of lower layers come first."""
        heads, size = self.leaders.get(layer, ()), self.config.block_size
        evicts = self.evicts and not self.config.is_dense_layer(layer)
        follows = any(found != layer for found in heads)
        if follows or (evicts and layer in self.followed):
            from_below = [None if found == layer else self._leading(found) for found in heads]
            self.stores[layer] = SharedPool(size, from_below, self.split, evicts=evicts)
        else:
            self.stores[layer] = EvictingPool(size) if evicts else BlockPool(size)
        return self.stores[layer]

    def _leading(self, layer: int) -> BlockPool | SharedPool:
        """Return the store of a layer that is followed, which is never one that frees what others need."""
        store = self.stores[layer]
        assert not isinstance(store, EvictingPool)
        return store

    def close(self) -> None:
        """Let go of all stores; a call that runs in another thread keeps its own, and is refused the next."""
        for store in self.stores.values():
            if isinstance(store, SharedPool):
                store.followers = []  # a cycle, which would keep the memory
        self.stores = {}

    def _open(self, layer: int) -> BlockPool | EvictingPool | SharedPool:
        """Return the store of `layer`. Raises `StoreError` where they are gone."""
        if layer not in self.stores:
            raise closed_cache()
        return self.stores[layer]

    def concerns(self, layer: int) -> bool:
        """True where dense calls of `layer` are to go through `attend`."""
        store = self.stores.get(layer)
        follows = isinstance(store, SharedPool) and bool(store.following)
        return follows or any(found == layer for found, _ in self.asked)

    def attend(
        self, layer: int, query: Tensor, terms: AttentionTerms, mask: Tensor | None, counts: LayerCounts, *, count: bool
    ) -> Tensor:
        """Attend with the last Q tokens of the store, [B, Hq, Q, D]; returns [B, Hq, Q, Dv].

        mask [B or 1, Q, L], True where allowed, or None: causal. count: this is a decode step.
        """
        store = self._open(layer)
        split = Split(self.split.sinks, self.split.recent, _first(mask, store.batch))
        runs = store.runs() if isinstance(store, SharedPool) else [(0, store.heads)]
        group = query.shape[1] // store.heads
        found = []
        for first, last in runs:
            heads = slice(first * group, last * group)
            found.append(
                self._attend_run(layer, first, last, query[:, heads], store, split, _of_heads(terms, heads), mask)
            )
        self.distant[layer] = torch.cat([one.distant for one in found], 1)
        if isinstance(store, SharedPool):
            store.settle(split.first)
        if count:
            kept, asked = sum(int(one.kept.sum()) for one in found), sum(one.asked for one in found)
            near = min(store.length, split.sinks + split.recent)
            rows, row = store.batch * store.heads, store.block_bytes() // store.block_size
            read = rows * near + kept * (store.length - near)
            counts.count_shared(store.length, read // rows, read * row, store.bytes(), asked, kept)
        return torch.cat([one.output for one in found], 1)

    def _attend_run(
        self, layer: int, first: int, last: int, query: Tensor, store: BlockPool | EvictingPool | SharedPool, split: Split,
        terms: AttentionTerms, mask: Tensor | None,
    ) -> Shared:  # fmt: skip
        """Attend with the query heads of the kv heads [first, last), which take distant keys from one layer."""
        leader = self.leaders[layer][first]
        estimate = None
        if leader == layer or not isinstance(store, SharedPool):
            distant = store.distant(first, last) if isinstance(store, SharedPool) else store.view()[0][:, first:last]
            own = [Part(0, distant)]
        else:
            distant = store.distant(first, last)
            begin = store.following.index(first)
            own = [Part(start, keys[:, begin : begin + last - first]) for start, keys in store.near()]
            if self.config.distant_gate is not None:
                group = query.shape[1] // (last - first)
                self._open(leader)
                estimate = self.distant[leader][:, first * group : last * group]
        values = store.values if isinstance(store, SharedPool) else store.view()[1]
        tau = self.config.distant_gate
        return shared_attention(
            query, own, distant, values[:, first:last], store.length, split, terms, mask, estimate, tau
        )

    def settle(self, layer: int) -> None:
        """Let `layer` drop its own keys of tokens that are distant now."""
        store = self._open(layer)
        if isinstance(store, SharedPool):
            store.settle(store.first)

    def check_crop(self, length: int) -> None:
        """Raise `ConfigError` where a layer could not be cut to `length` tokens."""
        for store in self.stores.values():
            if isinstance(store, SharedPool):
                store.check_crop(length)

    def saved_bytes(self) -> int:
        """Bytes of keys that are not held because a lower layer has them."""
        return sum(store.saved_bytes() for store in self.stores.values() if isinstance(store, SharedPool))


def _first(mask: Tensor | None, batch: int) -> Tensor | None:
    """Return where each row begins, [B], from what its last query may attend to; None if all begin at 0."""
    if mask is None:
        return None
    seen = mask[:, -1]
    first = torch.where(seen.any(1), seen.int().argmax(1), seen.shape[1])
    return first.expand(batch) if bool(first.any()) else None


def _of_heads(terms: AttentionTerms, heads: slice) -> AttentionTerms:
    return AttentionTerms(terms.scale, terms.softcap, None if terms.sinks is None else terms.sinks[heads])
