"""Which store a layer of a cache gets, from the policy and from where its blocks are to lie."""

import functools
from collections.abc import Callable
from typing import Any

from transformers import PreTrainedConfig

from attnpred.config import CacheConfig
from attnpred.policies.base import Policy
from attnpred.store import estimate
from attnpred.store.backing import Backing
from attnpred.store.base import Store
from attnpred.store.evicting import EvictingPool
from attnpred.store.pool import BlockPool
from attnpred.store.tiered import TieredStore
from attnpred.telemetry import LayerCounts


def new_store(
    index: int,
    model_config: PreTrainedConfig,
    settings: CacheConfig,
    policy: Policy[Any],
    backing: Backing | None,
    counts: LayerCounts,
) -> Store:
    """Return an empty store for layer `index`, one that shares its keys with no other. backing: the slow tier, if any."""
    if policy.evicts and not settings.is_dense_layer(index):
        return _evicting_store(model_config, settings)
    if backing is None:
        return BlockPool(settings.block_size)
    own = settings.for_layer(index)
    slots: Callable[[int], int] = functools.partial(estimate.dense_slots, own)
    if not policy.is_dense and not settings.is_dense_layer(index):
        slots = functools.partial(estimate.slots, own)
    return TieredStore(settings.block_size, slots, backing, counts, index)


def _evicting_store(model_config: PreTrainedConfig, settings: CacheConfig) -> Store:
    """Return a store in fast memory, also with `offload`: what is left is no more than the budget holds."""
    # Recovery is measured against all keys, and layers that share keys may keep different blocks.
    is_shared = bool(getattr(model_config, "num_kv_shared_layers", None))
    kind = BlockPool if settings.measure_recovery or is_shared else EvictingPool
    return kind(settings.block_size)
