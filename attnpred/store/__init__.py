"""Where keys and values live. A store knows block ids and tensors, nothing of scores, policies or models.

To add one: its file, and its line in `STORES`; the contract tests pick it up.
"""

from attnpred.store.behind import Behind
from attnpred.store.chain import Chain
from attnpred.store.disk import DiskTier
from attnpred.store.evicting import EvictingPool
from attnpred.store.fake import FakeTier
from attnpred.store.host import HostTier
from attnpred.store.pool import BlockPool
from attnpred.store.tier import Tier

STORES: dict[str, type[BlockPool] | type[EvictingPool]] = {"pool": BlockPool, "evicting": EvictingPool}

TIERS: dict[str, type[Tier]] = {
    "host": HostTier,
    "disk": DiskTier,
    "chain": Chain,
    "behind": Behind,
    "fake": FakeTier,
}
"""What can be written to; the contract tests have a maker for each."""
