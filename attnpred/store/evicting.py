"""`EvictingPool`: the keys and values that an evicting policy has left, and no others: what is released is freed.

Where heads keep about as much as each other, it is a `BlockPool` of what is left, with the open block in the last slot of
every head. Where that would take an eighth more than what all heads keep together, it is an `Arena`, in which each head
takes its own blocks alone. Either way `slot_of` says where the blocks of each kv head lie. Block ids stay places in the
context (rotary positions were applied before), and `length` stays the length of the context.

A released block leaves its slot empty; when an eighth of the slots is, the rest is copied. So it takes the bytes of what
is left, an eighth more at most for each of these two reasons, and room for 64 tokens of each head (`SPARE`).

Before the first release it is a `BlockPool` in all respects. Afterwards there is nothing to attend to everything with:
`pieces`, `whole` and `view` raise. A saved one has zeros where blocks are gone.
"""

from collections.abc import Iterator
from typing import Any, final

import torch
from torch import Tensor

from attnpred.errors import StoreError
from attnpred.shapes import num_blocks
from attnpred.store.arena import Arena
from attnpred.store.base import Piece, Resident, Store
from attnpred.store.export import Export, exact_export
from attnpred.store.pool import BlockPool
from attnpred.store.sealed import SealedBlocks

SLACK = 8
"""One slot more than there are blocks, for so many blocks, is left as it is."""


@final
class EvictingPool(Store):
    """What is left of the keys and values of one layer, in fast memory."""

    def __init__(self, block_size: int) -> None:
        self.block_size = block_size
        self.clear()

    def clear(self) -> None:
        """Forget everything and release the memory."""
        self.pool = BlockPool(self.block_size)
        self.arena: Arena | None = None  # in use where heads differ much; then the pool is empty
        self.length = 0
        self.slot_of: Tensor | None = None  # [B, Hkv, N], -1 where gone; None: block i in slot i, nothing released

    @property
    def keys(self) -> Tensor:
        """[B, Hkv, capacity, D], by slots."""
        return self.pool.keys if self.arena is None else self.arena.keys

    @property
    def values(self) -> Tensor:
        """[B, Hkv, capacity, Dv], by slots."""
        return self.pool.values if self.arena is None else self.arena.values

    @property
    def batch(self) -> int:
        return self.pool.batch if self.arena is None else self.arena.batch

    @property
    def heads(self) -> int:
        return self.pool.heads if self.arena is None else self.arena.heads

    def append(self, keys: Tensor, values: Tensor) -> None:
        (first, start), length = divmod(self.length, self.block_size), self.length + keys.shape[2]
        slots = self.slot_of
        if slots is not None and (count := num_blocks(length, self.block_size) - slots.shape[2]):
            new = self._next_slots(count) if self.arena is None else self.arena.take(count)
            slots = torch.cat((slots, new), 2)
        if self.arena is None:
            self.pool.append(keys, values)
        else:
            assert slots is not None
            self.arena.write(keys, values, slots[..., first:], start)
        self.slot_of, self.length = slots, length  # where they could not be added, nothing has changed

    def _next_slots(self, count: int) -> Tensor:
        """Return the slots in which the pool puts the next `count` blocks, [B, Hkv, count]."""
        used = num_blocks(self.pool.length, self.block_size)
        return torch.arange(used, used + count, device=self.keys.device).expand(self.batch, self.heads, -1)

    def release(self, kept: Tensor) -> None:
        blocks = num_blocks(self.length, self.block_size)
        stays = torch.zeros(*kept.shape[:2], blocks + 1, dtype=torch.bool, device=kept.device)
        stays.scatter_(2, kept.masked_fill((kept < 0) | (kept >= blocks), blocks), True)
        stays = stays[..., :blocks]
        slots = self.slot_of
        if slots is None:
            slots = torch.arange(blocks, device=kept.device).expand(self.batch, self.heads, -1)
        if not bool(((slots >= 0) & ~stays).any()):
            return
        if self.length % self.block_size and not bool(stays[..., -1].all()):
            raise StoreError("got a release of the block that is still growing, expected it to be kept by every head")
        slots = slots.masked_fill(~stays, -1)
        wanted, _ = self._wanted(slots)
        rows = self.batch * self.heads
        taken = rows * num_blocks(self.pool.length, self.block_size) if self.arena is None else self.arena.used
        if taken - wanted > wanted // SLACK:
            self._copy(slots)
        else:
            self.slot_of = slots

    def _wanted(self, slots: Tensor) -> tuple[int, bool]:
        """Return how many slots these blocks [B, Hkv, N] are to have, of all heads together, and whether in an arena."""
        left = (slots >= 0).sum(2)
        total, most = torch.stack((left.sum(), left.max())).tolist()
        even = most * left.numel()
        is_uneven = even - total > total // SLACK
        return (total if is_uneven else even), is_uneven

    def _copy(self, slots: Tensor) -> None:
        """Copy the blocks that lie in `slots` [B, Hkv, N], -1 where gone, to new memory without empty slots."""
        keys, values = self.keys, self.values
        present = slots >= 0
        wanted, is_uneven = self._wanted(slots)
        self.slot_of = torch.full_like(slots, -1)
        if is_uneven:
            found = present.nonzero(as_tuple=True)
            rows, heads, _ = found
            parts = (x.unflatten(2, (-1, self.block_size))[rows, heads, slots[found]] for x in (keys, values))
            self.arena, self.pool = Arena(self.block_size, *slots.shape[:2], *parts), BlockPool(self.block_size)
            self.slot_of[found] = torch.arange(wanted, device=slots.device)
            return
        count = wanted // (slots.shape[0] * slots.shape[1])
        # in the order of their ids, where a head has fewer behind others that are not there
        order = present.to(torch.uint8).argsort(dim=2, stable=True)[..., slots.shape[2] - count :]
        places = slots.gather(2, order)
        tokens = count * self.block_size - -self.length % self.block_size
        self.arena, self.pool = None, BlockPool(self.block_size)
        self.pool.append(
            *(gather_slots(x, places.clamp_min(0), self.block_size)[:, :, :tokens] for x in (keys, values))
        )
        new = torch.arange(count, device=slots.device).expand(order.shape)
        self.slot_of.scatter_(2, order, new.masked_fill(places < 0, -1))

    def wait(self, selection: Tensor) -> Resident:
        if self.slot_of is None:
            return Resident(self.keys, self.values, selection)
        slots = self.slot_of.gather(2, selection.clamp_min(0))
        if bool(((slots < 0) & (selection >= 0)).any()):
            raise StoreError("got a selection with blocks that were released, expected what is left alone")
        return Resident(self.keys, self.values, slots.clamp_min(0))

    def request(self, selection: Tensor) -> None:
        """Do nothing: every block is there, or gone."""

    # All of it, as long as nothing was released

    def _all(self) -> BlockPool:
        if self.slot_of is not None:
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
        if self.slot_of is None:
            return self.pool.keys_of(first, last)
        wanted = torch.arange(first, last, device=self.slot_of.device).expand(self.batch, self.heads, -1)
        return gather_slots(self.keys, self.wait(wanted).slots, self.block_size)

    # The batch and the length

    def crop(self, length: int) -> None:
        if length >= self.length:
            return
        if self.slot_of is None:
            self.length = length
            return self.pool.crop(length)
        blocks = num_blocks(length, self.block_size)
        if not blocks:
            return self.clear()
        slots = self.slot_of[..., :blocks]
        if not bool((slots[..., -1] >= 0).all()):
            raise StoreError(
                f"got a crop to {length} tokens, expected one that does not end in blocks that were released"
            )
        self.length = length
        self._copy(slots)

    def select(self, rows: Tensor) -> None:
        if self.slot_of is not None:
            self.slot_of = self.slot_of[rows.to(self.slot_of.device)]
        if self.arena is None:
            self.pool.select(rows)
        else:
            self._give_rows(self.arena)

    def repeat(self, times: int) -> None:
        if self.slot_of is not None:
            self.slot_of = self.slot_of.repeat_interleave(times, 0)
        if self.arena is None:
            self.pool.repeat(times)
        else:
            self._give_rows(self.arena)

    def _give_rows(self, arena: Arena) -> None:
        """Give every row of `slot_of` blocks of its own: two may be copies of one."""
        assert self.slot_of is not None
        arena.batch = self.slot_of.shape[0]
        self._copy(self.slot_of)

    def fork(self) -> "EvictingPool":
        """Return a second pool with the same content; nothing is copied before one of the two changes."""
        other = EvictingPool(self.block_size)
        other.pool, other.length, other.slot_of = self.pool.fork(), self.length, self.slot_of
        other.arena = None if self.arena is None else self.arena.fork()
        return other

    def __deepcopy__(self, memo: dict[int, Any]) -> "EvictingPool":
        return self.fork()

    # To and from a file

    def export(self) -> Export:
        slots = self.slot_of
        if slots is None:
            return self.pool.export()
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
        return self.pool.block_bytes() if self.arena is None else self.arena.block_bytes()

    def key_bytes(self) -> int:
        return self.length * self.batch * self.heads * self.keys.shape[3] * self.keys.element_size()

    def bytes(self) -> int:
        return self.length * self.batch * self.heads * self.block_bytes() // self.block_size

    def held_bytes(self) -> int:
        """Bytes that are allocated for keys and values, without the table."""
        return self.pool.fast_bytes() if self.arena is None else self.arena.fast_bytes()

    def fast_bytes(self) -> int:
        table = 0 if self.slot_of is None else self.slot_of.numel() * self.slot_of.element_size()
        return self.held_bytes() + table


def gather_slots(stored: Tensor, slots: Tensor, block_size: int) -> Tensor:
    """Return [B, Hkv, K * P, D] in the dtype of `stored` [B, Hkv, capacity, D]: its blocks `slots` [B, Hkv, K]."""
    whole = stored.unflatten(2, (-1, block_size))
    places = slots[..., None, None].expand(-1, -1, -1, *whole.shape[3:])
    return whole.gather(2, places).flatten(2, 3)
