"""`EvictingPool`: the keys and values that an evicting policy has left, and no others: what is released is freed.

It is a `BlockPool` of what is left, in which the slot of a block is no longer its id: `ids` says which lies in which slot of
each kv head. The open block is in the last slot of every head, so that tokens are appended as ever. Block ids stay places
in the context (rotary positions were applied before), and `length` stays the length of the context.

A released block leaves its slot empty; when an eighth of the slots is, the pool is copied without them. So it takes the
bytes of what is left, an eighth more at most, and room for 64 tokens (`SPARE`).

Before the first release it is a `BlockPool` in all respects. Afterwards there is nothing to attend to everything with:
`pieces`, `whole` and `view` raise. A saved one has zeros where blocks are gone.
"""

from collections.abc import Iterator
from typing import Any, final

import torch
from torch import Tensor

from attnpred.errors import StoreError
from attnpred.shapes import num_blocks
from attnpred.store.base import Piece, Resident, Store
from attnpred.store.export import Export, exact_export
from attnpred.store.pool import BlockPool
from attnpred.store.sealed import SealedBlocks

SLACK = 8
"""One empty slot for so many taken ones is left as it is."""


@final
class EvictingPool(Store):
    """What is left of the keys and values of one layer, in fast memory."""

    def __init__(self, block_size: int) -> None:
        self.block_size = block_size
        self.clear()

    def clear(self) -> None:
        """Forget everything and release the memory."""
        self.pool = BlockPool(self.block_size)
        self.length = 0
        self.ids: Tensor | None = None  # [B, Hkv, S], -1 for an empty slot; None: block i in slot i, nothing released
        self.slot_of = torch.empty(0)  # [B, Hkv, N + 1], -1 where gone, and in the last column

    @property
    def keys(self) -> Tensor:
        """[B, Hkv, capacity, D], by slots."""
        return self.pool.keys

    @property
    def values(self) -> Tensor:
        """[B, Hkv, capacity, Dv], by slots."""
        return self.pool.values

    @property
    def batch(self) -> int:
        return self.pool.batch

    @property
    def heads(self) -> int:
        return self.pool.heads

    def append(self, keys: Tensor, values: Tensor) -> None:
        self.pool.append(keys, values)
        first = num_blocks(self.length, self.block_size)
        self.length += keys.shape[2]
        last = num_blocks(self.length, self.block_size)
        if self.ids is not None and last > first:
            new = torch.arange(first, last, device=self.ids.device).expand(*self.ids.shape[:2], -1)
            self._place(torch.cat((self.ids, new), 2))

    def _place(self, ids: Tensor) -> None:
        """Let there be these blocks in the slots, [B, Hkv, S]."""
        blocks = num_blocks(self.length, self.block_size)
        self.ids = ids
        self.slot_of = torch.full((*ids.shape[:2], blocks + 1), -1, device=ids.device)
        slots = torch.arange(ids.shape[2], device=ids.device).expand(ids.shape)
        self.slot_of.scatter_(2, ids.masked_fill(ids < 0, blocks), slots)
        self.slot_of[..., blocks] = -1

    def release(self, kept: Tensor) -> None:
        blocks = num_blocks(self.length, self.block_size)
        stays = torch.zeros(*kept.shape[:2], blocks + 1, dtype=torch.bool, device=kept.device)
        stays.scatter_(2, kept.masked_fill((kept < 0) | (kept >= blocks), blocks), True)
        ids = self.ids
        if ids is None:
            ids = torch.arange(blocks, device=kept.device).expand(self.batch, self.heads, -1)
        gone = (ids >= 0) & ~stays.gather(2, ids.clamp_min(0))
        if not bool(gone.any()):
            return
        ids = ids.masked_fill(gone, -1)
        most = int((ids >= 0).sum(2).max())
        if ids.shape[2] - most > most // SLACK:
            self._compact(ids, most)
        else:
            self._place(ids)

    def _compact(self, ids: Tensor, slots: int) -> None:
        """Copy the blocks `ids` [B, Hkv, S], -1 for none, to a pool of so many slots, in order; -1 comes first."""
        unfilled = num_blocks(self.length, self.block_size) * self.block_size - self.length
        if unfilled and not bool((ids == self.length // self.block_size).any(2).all()):
            raise StoreError("got a release of the block that is still growing, expected it to be kept by every head")
        order = ids.argsort(dim=2, stable=True)[..., ids.shape[2] - slots :]
        old, self.pool = self.pool, BlockPool(self.block_size)
        tokens = slots * self.block_size - unfilled
        parts = (gather_slots(x, order, self.block_size)[:, :, :tokens] for x in (old.keys, old.values))
        self.pool.append(*parts)
        self._place(ids.gather(2, order))

    def wait(self, selection: Tensor) -> Resident:
        if self.ids is None:
            return Resident(self.keys, self.values, selection)
        slots = self.slot_of.gather(2, selection.clamp_min(0))
        if bool(((slots < 0) & (selection >= 0)).any()):
            raise StoreError("got a selection with blocks that were released, expected what is left alone")
        return Resident(self.keys, self.values, slots.clamp_min(0))

    def request(self, selection: Tensor) -> None:
        """Do nothing: every block is there, or gone."""

    # All of it, as long as nothing was released

    def _all(self) -> BlockPool:
        if self.ids is not None:
            raise StoreError(
                "got a call that attends to everything after blocks were evicted, expected the sparse path: run inside "
                "attnpred.attach(model)"
            )
        return self.pool

    def pieces(self) -> Iterator[Piece]:
        return self._all().pieces()

    def whole(self) -> Piece:
        return self._all().whole()

    def view(self) -> tuple[Tensor, Tensor]:
        return self._all().view()

    def keys_of(self, first: int, last: int) -> Tensor:
        if self.ids is None:
            return self.pool.keys_of(first, last)
        wanted = torch.arange(first, last, device=self.ids.device).expand(self.batch, self.heads, -1)
        return gather_slots(self.keys, self.wait(wanted).slots, self.block_size)

    # The batch and the length

    def crop(self, length: int) -> None:
        if length >= self.length:
            return
        if self.ids is None:
            self.length = length
            return self.pool.crop(length)
        blocks = num_blocks(length, self.block_size)
        ids = self.ids.masked_fill(self.ids >= blocks, -1)
        if blocks and not bool((ids == blocks - 1).any(2).all()):
            raise StoreError(
                f"got a crop to {length} tokens, expected one that does not end in blocks that were released"
            )
        if not blocks:
            return self.clear()
        self.length = length
        self._compact(ids, int((ids >= 0).sum(2).max()))

    def select(self, rows: Tensor) -> None:
        self.pool.select(rows)
        if self.ids is not None:
            self._place(self.ids[rows.to(self.ids.device)])

    def repeat(self, times: int) -> None:
        self.pool.repeat(times)
        if self.ids is not None:
            self._place(self.ids.repeat_interleave(times, 0))

    def fork(self) -> "EvictingPool":
        """Return a second pool with the same content; nothing is copied before one of the two changes."""
        other = EvictingPool(self.block_size)
        other.pool, other.length, other.ids, other.slot_of = self.pool.fork(), self.length, self.ids, self.slot_of
        return other

    def __deepcopy__(self, memo: dict[int, Any]) -> "EvictingPool":
        return self.fork()

    # To and from a file

    def export(self) -> Export:
        if self.ids is None:
            return self.pool.export()
        blocks = num_blocks(self.length, self.block_size)
        slots = self.slot_of[..., :blocks]
        gone = (slots < 0).repeat_interleave(self.block_size, 2)[..., None]
        keys, values = (
            gather_slots(x, slots.clamp_min(0), self.block_size).masked_fill(gone, 0.0)[:, :, : self.length]
            for x in (self.keys, self.values)
        )
        return exact_export(keys, values, self.block_size)

    def adopt(self, sealed: SealedBlocks, keys: Tensor, values: Tensor) -> None:
        self.clear()
        self.pool.adopt(sealed, keys, values)
        self.length = self.pool.length

    # Sizes

    def block_bytes(self) -> int:
        return self.pool.block_bytes()

    def key_bytes(self) -> int:
        return self.length * self.batch * self.heads * self.keys.shape[3] * self.keys.element_size()

    def bytes(self) -> int:
        return self.length * self.batch * self.heads * self.block_bytes() // self.block_size

    def fast_bytes(self) -> int:
        tables = () if self.ids is None else (self.ids, self.slot_of)
        return self.pool.fast_bytes() + sum(x.numel() * x.element_size() for x in tables)


def gather_slots(stored: Tensor, slots: Tensor, block_size: int) -> Tensor:
    """Return [B, Hkv, K * P, D] in the dtype of `stored` [B, Hkv, capacity, D]: its blocks `slots` [B, Hkv, K]."""
    whole = stored.unflatten(2, (-1, block_size))
    places = slots[..., None, None].expand(-1, -1, -1, *whole.shape[3:])
    return whole.gather(2, places).flatten(2, 3)
