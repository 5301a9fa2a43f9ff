"""`Backing`: what the layers of a cache, and its forks, have in common: the slow tier, its readers, the codec's name.

`open_backing` builds the tier that the settings ask for: host memory, a file, or the one below the other. A file is written
behind the computation (`Behind`). Below them may lie a saved cache, from which blocks are read and none is ever moved.
"""

import weakref
from pathlib import Path
from typing import final

from attnpred.config import CacheConfig
from attnpred.store.behind import Behind
from attnpred.store.chain import Chain
from attnpred.store.disk import DiskTier
from attnpred.store.fetch import Fetcher
from attnpred.store.host import HostTier
from attnpred.store.tier import Tier

WRITE_QUEUE = 2 << 20
"""Bytes that may wait to be written to a file."""


@final
class Backing:
    """A slow tier with its readers; lives as long as a store uses it, or until it is closed."""

    def __init__(self, tier: Tier, codec: str | None = None, timeout: float = 60.0) -> None:
        self.tier, self.codec, self.timeout = tier, codec, timeout
        self.fetcher = Fetcher(tier)
        self.users: weakref.WeakSet[object] = weakref.WeakSet()
        """Caches that have neither closed it nor been dropped."""

    def close(self, user: object) -> None:
        """One user less; the last one frees the tier."""
        self.users.discard(user)
        if not self.users:
            self.fetcher.close()
            self.tier.close()


def open_backing(config: CacheConfig, *, pin: bool = False, saved: Tier | None = None) -> Backing:
    """Return the backing for `config.offload`, which is not None; pin: host memory for copies to a GPU.

    saved: a tier that is only read; its places are the backing's own.
    """
    tiers = [] if saved is None else [saved]
    tiers += slow_tiers(config, pin)
    return Backing(Chain(tiers) if len(tiers) > 1 else tiers[0], config.offload_dtype, config.fetch_timeout)


def slow_tiers(config: CacheConfig, pin: bool = False) -> list[Tier]:
    """Return the tiers that the settings ask for, still empty, in the order in which they are filled."""
    if config.offload == "cpu":
        return [HostTier(config.host_limit, pin)]
    folder = None if config.offload_dir is None else Path(config.offload_dir)
    disk = Behind(DiskTier(folder, config.disk_limit), WRITE_QUEUE, config.fetch_timeout)
    return [disk] if config.host_limit is None else [HostTier(config.host_limit, pin), disk]
