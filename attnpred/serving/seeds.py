"""`Seeds`: caches of documents as a policy has read them, in memory, of which every question takes a fork.

Blocks (`chain`) spare the reading of a document; but a policy looks at its last tokens by itself, and some are fitted to
what they see there, and that is most of what a short question costs. So a prompt about documents is read in two calls
whatever is kept: to the end of the documents, and the question. What there is after the first is the same for all questions.
"""

import hashlib
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any, final

import torch

from attnpred.config import CacheConfig
from attnpred.hf import TieredCache
from attnpred.policies.base import Policy

Key = tuple[str, Policy[Any], CacheConfig]


def key_of(root: str, ids: Sequence[int], policy: Policy[Any], settings: CacheConfig) -> Key:
    """Return what a cache that holds `ids` depends on. root: see `chain`."""
    digest = hashlib.sha256(root.encode())
    digest.update(torch.tensor(ids, dtype=torch.int64, device="cpu").numpy().tobytes())
    return digest.hexdigest(), policy, settings


@final
class Seeds:
    """limit: bytes of all that are kept. One thread uses it."""

    def __init__(self, limit: int) -> None:
        self.limit, self.held_bytes = limit, 0
        self._held: OrderedDict[Key, tuple[TieredCache, int]] = OrderedDict()

    def take(self, key: Key) -> TieredCache | None:
        """Return a fork of the cache of that key; None if there is none."""
        if key not in self._held:
            return None
        self._held.move_to_end(key)
        return self._held[key][0].fork()

    def put(self, key: Key, cache: TieredCache) -> None:
        """Keep a fork of `cache`, if there is room for it, and let go those that were used longest ago."""
        stats = cache.stats()
        size = int(stats["fast_bytes"]) + int(stats.get("slow_bytes", {}).get("host", 0))
        if size > self.limit or key in self._held:
            return
        while self.held_bytes + size > self.limit:
            self._let_go(next(iter(self._held)))
        self._held[key] = cache.fork(), size
        self.held_bytes += size

    def close(self) -> None:
        """Let all of them go."""
        for key in list(self._held):
            self._let_go(key)

    def _let_go(self, key: Key) -> None:
        cache, size = self._held.pop(key)
        self.held_bytes -= size
        cache.close()
