"""`Export`: what is saved of a store: its full blocks as units, and the tokens of the block that is still growing.

Sealed blocks are taken as they lie in the slow tier, so that a compressed one keeps its value. What lies in fast memory
alone is saved bit by bit. Units come in pieces of about a megabyte, because a cache may be larger than memory.
"""

from collections.abc import Iterator
from typing import NamedTuple

from torch import Tensor

from attnpred.store.codec import Codec, Exact
from attnpred.store.records import SEGMENT_BYTES


class Export(NamedTuple):
    """codec: a name in `CODECS`; units: pieces uint8 [n, unit_bytes] in host memory; keys, values [B, Hkv, L % P, D].

    The units are those of batch row 0, block after block, of each block all kv heads; then those of row 1.
    """

    codec: str | None
    unit_bytes: int
    units: Iterator[Tensor]
    keys: Tensor
    values: Tensor


def exact_export(keys: Tensor, values: Tensor, block_size: int) -> Export:
    """Return the export of keys [B, Hkv, L, D] and values [B, Hkv, L, Dv], none of them compressed."""
    codec = Exact(block_size, keys.shape[3], values.shape[3], keys.dtype)
    full = keys.shape[2] // block_size * block_size
    units = _units(codec, keys[:, :, :full], values[:, :, :full])
    return Export(None, codec.unit_bytes, units, keys[:, :, full:], values[:, :, full:])


def _units(codec: Codec, keys: Tensor, values: Tensor) -> Iterator[Tensor]:
    step = blocks_per_piece(keys.shape[1] * codec.unit_bytes) * codec.block_size
    for row in zip(keys, values, strict=True):
        for first in range(0, keys.shape[2], step):
            parts = (x[:, first : first + step].unflatten(1, (-1, codec.block_size)) for x in row)
            yield codec.encode(*(part.transpose(0, 1).flatten(0, 1) for part in parts)).cpu()


def blocks_per_piece(block_bytes: int) -> int:
    """Return how many blocks of `block_bytes`, all heads together, make a piece."""
    return max(1, SEGMENT_BYTES // block_bytes)
