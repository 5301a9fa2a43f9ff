"""What a cache will take of fast memory, host memory and disk, worked out before the first token.

A layer whose blocks are offloaded keeps in fast memory a pool of slots (one slot is one block of one kv head), the tables
that say what lies where, and the policy's memory of every block; the cache as a whole has a few buffers on top. Every block
lies in the slow tier as well, so that a slot can be given to another block without writing anything. A layer whose blocks
all have a slot sends nothing there. Whole layers, which dense steps attend to, are streamed in pieces, one of them ahead.

These are the bytes in use, so that they can be checked by hand: a table that grows has room to grow, and torch and the
operating system round up. Nothing here knows a model or a policy: `attnpred.hf.sizes` makes the `LayerShape`s.
"""

import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from attnpred.config import CacheConfig
from attnpred.errors import TierFullError
from attnpred.shapes import num_blocks
from attnpred.store.backing import WRITE_QUEUE
from attnpred.store.base import PIECE_TOKENS
from attnpred.store.records import SEGMENT_BYTES

DENSE_SLOTS = 2
"""Slots of a head in a layer that stays dense: it is streamed from the slow tier in pieces, and reads no block alone."""

BLOCK_TABLE, SLOT_TABLE, RECORD_TABLE = 4 + 4, 4 + 4, 8 + 8 + 4
"""Bytes for a block of a head: its slot and check; for a slot: its block, and when that was wanted; for a block of all
heads: the id of its record, where that lies, and how many use it (`SlotTable`, `Records`)."""


@dataclass(frozen=True, slots=True)
class LayerShape:
    """One full-attention layer: D of keys and of values, bytes of a number, G = `group` query heads of a kv head.

    memory_bytes: what the policy's memory of this layer takes at the context asked for, all rows of the batch together.
    index: its number in the model.
    """

    kv_heads: int
    key_dim: int
    value_dim: int
    item_bytes: int
    group: int = 1
    memory_bytes: int = 0
    is_dense: bool = False
    index: int = 0

    @property
    def token_bytes(self) -> int:
        """Bytes of the key and the value of one token of one head, as the model made them."""
        return (self.key_dim + self.value_dim) * self.item_bytes

    def unit_bytes(self, config: CacheConfig) -> int:
        """Bytes of one block of one head in the slow tier."""
        # compressed: a byte per number, and for every token two scales of 16 bits, of its key and of its value
        per_token = self.key_dim + self.value_dim + 4 if config.offload_dtype else self.token_bytes
        return num_blocks(config.block_size * per_token, 8) * 8


@dataclass(frozen=True, slots=True)
class Estimate:
    """Bytes. full: all keys and values; host, disk: blocks in the slow tier; the others are the parts of `fast`."""

    full: int
    pool: int
    memory: int
    tables: int
    buffers: int
    host: int
    disk: int

    @property
    def fast(self) -> int:
        """Bytes of fast memory in all."""
        return self.pool + self.memory + self.tables + self.buffers

    def as_dict(self) -> dict[str, int]:
        """Return all figures by name, `fast` among them."""
        return {"full": self.full, "fast": self.fast} | asdict(self)


def slots(config: CacheConfig, tokens: int, group: int = 1) -> int:
    """Return the slots of a kv head for a context of `tokens`: the budget, and a few for blocks on their way."""
    wanted = config.budget_blocks(tokens + 1) * (group if config.per_query_head else 1)
    return min(wanted + wanted // 32 + 1, num_blocks(tokens + 1, config.block_size))


def dense_slots(config: CacheConfig, tokens: int) -> int:
    """Return the slots of a kv head of a layer that stays dense: all blocks as long as the budget holds them."""
    blocks = num_blocks(tokens, config.block_size)
    return blocks if config.budget_blocks(tokens) >= blocks else DENSE_SLOTS


def estimate(config: CacheConfig, layers: Sequence[LayerShape], tokens: int, batch: int = 1) -> Estimate:
    """Return what a cache of `layers` takes at a context of `tokens` in each of `batch` rows."""
    full = sum(layer.kv_heads * layer.token_bytes for layer in layers) * tokens * batch
    memory = sum(layer.memory_bytes for layer in layers if not layer.is_dense)
    if config.offload is None:
        return Estimate(full=full, pool=full, memory=memory, tables=0, buffers=0, host=0, disk=0)
    pool = tables = slow = 0
    blocks, sealed = num_blocks(tokens, config.block_size), tokens // config.block_size
    for layer in layers:
        heads = batch * layer.kv_heads
        own = config.for_layer(layer.index)
        held = dense_slots(own, tokens) if layer.is_dense else slots(own, tokens, layer.group)
        pool += heads * held * config.block_size * layer.token_bytes
        tables += heads * (blocks * BLOCK_TABLE + held * SLOT_TABLE) + batch * blocks * RECORD_TABLE
        if held < blocks:
            record = layer.kv_heads * layer.unit_bytes(config)
            per_segment = max(1, SEGMENT_BYTES // record)
            slow += num_blocks(batch * sealed, per_segment) * per_segment * record
    # one piece as the model made it, the same as it came from the slow tier, and the next
    buffers = 3 * PIECE_TOKENS * batch * max((layer.kv_heads * layer.token_bytes for layer in layers), default=0)
    on_disk = config.offload == "disk"
    host = min(slow, config.host_limit or 0) if on_disk else slow
    return Estimate(
        full=full,
        pool=pool,
        memory=memory,
        tables=tables,
        buffers=buffers + (WRITE_QUEUE if on_disk else 0),
        host=host,
        disk=slow - host,
    )


def admit(config: CacheConfig, wanted: Estimate, host_free: int | None, disk_free: int | None) -> None:
    """Raise `TierFullError` where `wanted` is more than a limit, or more than is free; None: it is not known how much is.

    Only the slow tier is held against what is free: what fast memory has left changes with the model's own work.
    """
    shorter = ["lower the context"]
    leaner = ["lower the budget", *shorter] if config.offload else [*shorter, "set offload='cpu'"]
    smaller = [*shorter, "set offload_dtype='int8'"] if config.offload and not config.offload_dtype else shorter
    on_host = [*smaller, "set offload='disk'"] if config.offload == "cpu" else [*smaller, "lower host_limit"]
    for tier, size, allowed, limit, advice in (
        ("fast memory", wanted.fast, config.fast_limit, "fast_limit", [*leaner, "raise fast_limit"]),
        ("host memory", wanted.host, config.host_limit, "host_limit", [*on_host, "raise host_limit"]),
        ("host memory", wanted.host, host_free, "free", on_host),
        ("disk", wanted.disk, config.disk_limit, "disk_limit", [*smaller, "raise disk_limit"]),
        ("disk", wanted.disk, disk_free, "free", [*smaller, "set another offload_dir"]),
    ):
        if allowed is not None and size > allowed:
            raise TierFullError(
                f"got a cache of {readable(size)} of {tier}, expected at most {readable(allowed)} ({limit}): "
                f"{', '.join(advice[:-1])} or {advice[-1]}"
            )


def readable(size: int) -> str:
    """Return a number of bytes as people write it."""
    if size < 1 << 10:
        return f"{size} bytes"
    power = min((size.bit_length() - 1) // 10, 4)
    return f"{size / (1 << 10 * power):.2f} {' KMGT'[power]}iB"


def free_host_bytes() -> int | None:
    """Return the host memory that the system could give, in bytes; None where it does not say (other than Linux)."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    found = [int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable:")]
    return found[0] if found else None


def free_disk_bytes(folder: str | Path) -> int:
    """Return the bytes left where `folder` is, or would be made."""
    path = Path(folder).expanduser().absolute()
    return shutil.disk_usage(next(place for place in (path, *path.parents) if place.exists())).free
