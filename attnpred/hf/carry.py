"""`carry_over`: a text that was read once goes on under several policies.

Reading leaves two things behind. Keys and values are the same for every policy, since a text is read with full attention;
they are copied here. What a policy remembers, it takes from the attention of the text's last queries (`last_queries`); so
these are read again, by each cache for itself: leave that many tokens out of the first reading, and give them to every cache
after `carry_over`, in one call. Then each is in the state in which it would be had it read all of the text.
"""

import copy
from typing import Any

from attnpred.config import CacheConfig
from attnpred.errors import ConfigError
from attnpred.hf.cache import TieredCache
from attnpred.hf.layer import TieredLayer
from attnpred.policies.base import Policy
from attnpred.store.base import Store
from attnpred.store.pool import BlockPool

WINDOW = 64
"""The most of a text's last queries that a policy looks at, beside those of the history (`snapkv`)."""


def last_queries(settings: CacheConfig) -> int:
    """Return how many of a text's last tokens each policy has to read for itself."""
    return max(WINDOW, settings.history)


def is_carried(policy: Policy[Any], settings: CacheConfig) -> bool:
    """Return whether keys, values and the last queries of a text are all that `policy` takes from it."""
    memory = policy.memory(settings, 0)
    return not (policy.reads_tokens or memory.every or memory.rows > last_queries(settings))


def carry_over(source: TieredCache, cache: TieredCache) -> None:
    """Copy the keys and values of `source` into the empty `cache`, which may have another policy, budget and offload.

    Raises `ConfigError` where the one cannot give, or the other has to see, every token: a policy that evicts has dropped
    some; one that counts attention from the first query on, or looks at token ids, has to read the text itself.
    """
    _check(source, cache)
    for index, (old, new) in enumerate(zip(source.layers, cache.layers, strict=True)):
        if type(old) is not TieredLayer or type(new) is not TieredLayer:
            cache.layers[index] = copy.deepcopy(old)  # sliding and other layers are stock in both
            continue
        if old.store.length and _can_fork(old.store, new.store):
            new.lazy_initialization(*old.store.view())
            cache.admit(old.store.length, old.store.batch, new.dtype)
            new.store = copy.deepcopy(old.store)  # a fork: nothing is copied before one of the two gets its next token
            continue
        for piece in old.store.pieces():
            if not new.is_initialized:
                new.lazy_initialization(piece.keys, piece.values)
                cache.admit(old.store.length, old.store.batch, piece.keys.dtype)
            new.store.append(piece.keys, piece.values)
    cache.tokens, cache.model = source.tokens, source.model


def _can_fork(old: Store, new: Store) -> bool:
    """Return whether a fork of the one is what the other would be."""
    return type(old) is BlockPool and type(new) is BlockPool and old.block_size == new.block_size


def _check(source: TieredCache, cache: TieredCache) -> None:
    if cache.get_seq_length():
        raise ConfigError(f"got a cache of {cache.get_seq_length()} tokens, expected an empty one")
    if source.model_config is not cache.model_config:
        raise ConfigError("got caches of two models, expected one model for both")
    if source.policy.evicts or source.sharing is not None or cache.sharing is not None:
        raise ConfigError(
            "got a cache that evicts or shares keys between layers, expected one with all keys of every layer: "
            "read the text again"
        )
    if not is_carried(cache.policy, cache.settings):
        raise ConfigError(
            f"got policy {type(cache.policy).__name__}, which looks at every token of a text while it is read, expected one "
            "that looks at the last ones: read the text again"
        )
