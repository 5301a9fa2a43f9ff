"""`TieredStore`: the keys and values of one layer, a few blocks of each head in fast memory, all sealed ones in a slow tier.

While the context fits the slots, slot i holds block i and nothing is written. Then the store *spills*: every block is
written once, when it is full (*sealed*), and fast memory is a cache of the slow tier with a table of slots for each head.
The open block, which is still growing, always has a slot.

A sealed block has the same value wherever it lies: with a lossy codec its slot is rounded when it is written. So neither
what is evicted, nor what arrives when, changes a token; and without one the bits are those of `BlockPool`.

`request` fetches what is missing of the next selection in the background, `wait` what is still missing of this one; only
misses move.
"""

import copy
import time
from collections.abc import Callable, Iterator
from typing import Any, final

import torch
from torch import Tensor

from attnpred.shapes import expect, num_blocks
from attnpred.store.backing import Backing
from attnpred.store.base import Piece, Resident, Store
from attnpred.store.export import Export, exact_export
from attnpred.store.sealed import Coming, SealedBlocks
from attnpred.store.slots import ABSENT, COMING, SlotTable
from attnpred.telemetry import LayerCounts

MOST_COMING = 1 / 2
"""What is on its way takes memory of its own: more than this share of the slots' is not left there, but waited for at once.
That happens after a prompt, when nothing is in the slots yet."""


@final
class TieredStore(Store):
    """One layer; `slots(L)`: how many blocks of each head fast memory shall hold in a context of L tokens."""

    def __init__(
        self, block_size: int, slots: Callable[[int], int], backing: Backing, counts: LayerCounts, layer: int = 0
    ) -> None:
        self.block_size, self.slots, self.backing, self.counts, self.layer = block_size, slots, backing, counts, layer
        self.sealed: SealedBlocks | None = None
        self.coming: list[Coming] = []
        self.clear()

    def clear(self) -> None:
        self._abandon()
        if self.sealed is not None:
            self.sealed.crop(0)
        self.length = 0
        self.keys = self.values = torch.empty(0, dtype=torch.float32, device="cpu")
        self.sealed = None
        self.table = SlotTable(0, 0)
        self.open_slots = torch.empty(0, dtype=torch.int64, device="cpu")
        self.aim, self.aim_blocks = torch.empty(0, 0, dtype=torch.bool, device="cpu"), 0  # what was last asked for

    @property
    def heads(self) -> int:
        return self.keys.shape[1] if self.keys.ndim == 4 else 0

    @property
    def batch(self) -> int:
        return self.keys.shape[0] if self.keys.ndim == 4 else 0

    # Fast memory

    def _slot_view(self, stored: Tensor) -> Tensor:
        """Return `stored` as [R, S, P, D]."""
        return stored.view(self.batch * self.heads, -1, self.block_size, stored.shape[3])

    def _resize(self, slots: int) -> None:
        """Have `slots` slots; what lies in the first ones stays."""
        for name in ("keys", "values"):
            old = getattr(self, name)
            new = old.new_zeros(*old.shape[:2], slots * self.block_size, old.shape[3])
            kept = min(old.shape[2], new.shape[2])
            new[:, :, :kept] = old[:, :, :kept]
            setattr(self, name, new)
        self.table.add_slots(max(0, slots - self.table.slots))

    def append(self, keys: Tensor, values: Tensor) -> None:
        batch, heads, tokens, _ = keys.shape
        if self.heads == 0:
            self.keys, self.values = (x.new_zeros(batch, heads, 0, x.shape[3]) for x in (keys, values))
        expect("keys", keys, self.batch, self.heads, -1, self.keys.shape[3])
        expect("values", values, self.batch, self.heads, tokens, self.values.shape[3])
        length = self.length + tokens
        blocks, slots = num_blocks(length, self.block_size), self.slots(length)
        if self.sealed is None and blocks <= slots:
            if length > self.keys.shape[2]:
                self._resize(min(slots, blocks * 5 // 4 + 4))
            self.keys[:, :, self.length : length], self.values[:, :, self.length : length] = keys, values
            self.length = length
            return
        sealed, before = self.sealed or self._spill(slots), self.length
        try:
            self._append_below(sealed, keys, values)
        except BaseException:  # the tier is full or failing: what was there before is still all there
            sealed.crop(before // self.block_size)
            self.table.crop(num_blocks(before, self.block_size))
            self.length = before
            raise

    def _append_below(self, sealed: SealedBlocks, keys: Tensor, values: Tensor) -> None:
        """Seal what is full, and leave the rest in the open block."""
        size, taken, tokens = self.block_size, 0, keys.shape[2]
        if self.length % size:
            taken = min(tokens, size - self.length % size)
            self._fill_open(sealed, keys[:, :, :taken], values[:, :, :taken])
        whole = (tokens - taken) // size * size
        self.table.add_blocks(whole // size)
        for first in range(taken, taken + whole, self.piece_tokens):
            last = min(first + self.piece_tokens, taken + whole)
            sealed.write(keys[:, :, first:last], values[:, :, first:last], self.counts)
        self.length += whole
        if taken + whole < tokens:
            self.table.add_blocks(1)
            rows = torch.arange(self.batch * self.heads, device="cpu")
            self.open_slots = self.table.place(rows, torch.full_like(rows, self.length // size))
            self._fill_open(sealed, keys[:, :, taken + whole :], values[:, :, taken + whole :])

    def _spill(self, slots: int) -> SealedBlocks:
        """Write everything down, and make the slots a cache of it."""
        rows, blocks = self.batch * self.heads, num_blocks(self.length, self.block_size)
        self._resize(max(slots, blocks))
        self.sealed = SealedBlocks.begin(self.backing, self.block_size, self.keys, self.values, self.layer)
        self.table = SlotTable(rows, self.keys.shape[2] // self.block_size)
        self.table.add_blocks(blocks)
        self.table.slot_of[:] = self.table.block_in[:, :blocks] = torch.arange(blocks, dtype=torch.int32, device="cpu")
        self.open_slots = torch.full((rows,), blocks - 1, dtype=torch.int64, device="cpu")
        full = self.length // self.block_size * self.block_size
        if full:
            try:
                units = self.sealed.write(self.keys[:, :, :full], self.values[:, :, :full], self.counts)
            except BaseException:
                self.sealed = None  # everything is still in its slot
                raise
            self._round(self.sealed, units, 0)
        if blocks > slots:
            self._shrink(slots)
        return self.sealed

    def _shrink(self, slots: int) -> None:
        """Keep `slots` slots, with the open block in the first."""
        is_open = self.length % self.block_size > 0
        opened = [self._open(x) for x in (self.keys, self.values)] if is_open else []
        rows = torch.arange(self.batch * self.heads, device="cpu")
        self._resize(slots)
        self.table = SlotTable(rows.numel(), slots)
        self.table.add_blocks(num_blocks(self.length, self.block_size))
        if is_open:
            self.open_slots = self.table.place(rows, torch.full_like(rows, self.length // self.block_size))
            for stored, block in zip((self.keys, self.values), opened, strict=True):
                self._slot_view(stored)[rows.to(stored.device), self.open_slots.to(stored.device)] = block.flatten(0, 1)

    def _fill_open(self, sealed: SealedBlocks, keys: Tensor, values: Tensor) -> None:
        """Write tokens into the open block; seal it if it is full."""
        first, tokens = self.length % self.block_size, keys.shape[2]
        rows = torch.arange(self.batch * self.heads, device=keys.device)
        slots = self.open_slots.to(keys.device)
        for stored, new in ((self.keys, keys), (self.values, values)):
            self._slot_view(stored)[rows, slots, first : first + tokens] = new.flatten(0, 1)
        self.length += tokens
        if self.length % self.block_size == 0:
            units = sealed.write(self._open(self.keys), self._open(self.values), self.counts)
            self._round(sealed, units, sealed.count - 1)

    def _open(self, stored: Tensor) -> Tensor:
        """Return the open block of `stored`, [B, Hkv, P, D]."""
        rows, slots = torch.arange(self.batch * self.heads, device=stored.device), self.open_slots.to(stored.device)
        return self._slot_view(stored)[rows, slots].unflatten(0, (self.batch, -1))

    def _round(self, sealed: SealedBlocks, units: Tensor, first: int) -> None:
        """Give the slots of the blocks from `first` on the values that were written, where these are not the same."""
        if sealed.is_exact:
            return
        slots = self.table.slot_of[:, first : sealed.count].long().to(self.keys.device)
        rows = torch.arange(slots.shape[0], device=slots.device)[:, None]
        for stored, new in zip((self.keys, self.values), sealed.decode(units, sealed.count - first), strict=True):
            self._slot_view(stored)[rows, slots] = new.flatten(0, 1).unflatten(1, (-1, self.block_size))

    # Dense passes

    def pieces(self) -> Iterator[Piece]:
        size, sealed = self.piece_tokens, self.sealed
        if sealed is None:
            for start in range(0, self.length, size):
                stop = min(start + size, self.length)
                yield Piece(start, self.keys[:, :, start:stop], self.values[:, :, start:stop])
            return
        start, left = 0, self.length % self.block_size
        for keys, values in sealed.pieces(sealed.count, size // self.block_size, self.keys.device, self.counts):
            if keys.shape[2] < size and left:  # the open block belongs to this piece
                keys = torch.cat((keys, self._open(self.keys)[:, :, :left]), 2)
                values = torch.cat((values, self._open(self.values)[:, :, :left]), 2)
            yield Piece(start, keys, values)
            start += size
            del keys, values  # no more than one piece besides those that come
        if sealed.count * self.block_size == start and left:
            yield Piece(start, self._open(self.keys)[:, :, :left], self._open(self.values)[:, :, :left])

    def keys_of(self, first: int, last: int) -> Tensor:
        if self.sealed is None:
            return self.keys[:, :, first * self.block_size : last * self.block_size]
        slots = self.table.slot_of[:, first:last].long()
        if bool((slots < 0).any()):
            coming = self.sealed.start_blocks(first, last, self.keys.device, self.counts)
            return self.sealed.finish_blocks(coming, self.counts)[0]
        rows = torch.arange(slots.shape[0], device="cpu")[:, None]
        return self._slot_view(self.keys)[rows, slots].flatten(1, 2).unflatten(0, (self.batch, -1))

    def view(self) -> tuple[Tensor, Tensor]:
        parts = list(self.pieces())
        return torch.cat([piece.keys for piece in parts], 2), torch.cat([piece.values for piece in parts], 2)

    # Sparse steps

    def _needed(self, selection: Tensor) -> Tensor:
        """Return the blocks that `selection` [B, Hs, K] names, and the open one, as bool [R, N]; have slots for all of them.

        Blocks that do not exist are left out.
        """
        blocks = self.table.slot_of.shape[1]
        ids = selection.cpu().view(self.batch * self.heads, -1)
        marked = torch.zeros(ids.shape[0], blocks + 1, dtype=torch.bool, device="cpu")
        marked.scatter_(1, ids.masked_fill((ids < 0) | (ids > blocks), blocks), True)
        if self.length % self.block_size:
            marked[:, blocks - 1] = True
        opens = self.length % self.block_size == 0  # then the next block does so before the next step
        needed = marked[:, :blocks]
        self.aim, self.aim_blocks = needed, blocks + opens
        most = int(needed.sum(1).max()) + opens
        if most > self.table.slots:
            self._resize(max(most, self.slots(self.length)))
        return needed

    def _start(self, sealed: SealedBlocks, needed: Tensor) -> None:
        """Begin to fetch those of the blocks `needed` [R, N] that are absent."""
        missing = needed & (self.table.slot_of == ABSENT)
        if bool(missing.any()):
            rows, blocks = missing.nonzero(as_tuple=True)
            self.coming.append(sealed.start_units(rows, blocks, self.keys.device, self.counts))
            self.table.slot_of[rows, blocks] = COMING

    def _install(self, sealed: SealedBlocks, needed: Tensor) -> None:
        """Wait for everything on its way, and put what is `needed` [R, N] into slots; the rest is absent again."""
        while self.coming:
            coming = self.coming.pop(0)
            self.table.slot_of[coming.rows, coming.blocks] = ABSENT
            began = time.perf_counter()
            units = sealed.finish(coming, self.counts)
            self.counts.exposed_wait += time.perf_counter() - began
            kept = needed[coming.rows, coming.blocks].nonzero().flatten()
            self.counts.bytes_wasted += (units.shape[0] - kept.numel()) * units.shape[1]
            if not kept.numel():
                continue
            rows = coming.rows[kept]
            slots = self.table.place(rows, coming.blocks[kept]).to(units.device)
            decoded = sealed.codec.decode(units if kept.numel() == units.shape[0] else units[kept.to(units.device)])
            places = rows.to(units.device) * self.table.slots + slots
            for stored, new in zip((self.keys, self.values), decoded, strict=True):
                self._slot_view(stored).flatten(0, 1).flatten(1).index_copy_(0, places, new.flatten(1))

    def request(self, selection: Tensor) -> None:
        if self.sealed is not None:
            needed = self._needed(selection)
            self.table.want(needed)  # so that an open block, which comes before the next step, evicts none of them
            self._start(self.sealed, needed)
            if sum(coming.bytes for coming in self.coming) > MOST_COMING * self._pool_bytes():
                self._install(self.sealed, needed)

    def wait(self, selection: Tensor) -> Resident:
        if self.sealed is None:
            return Resident(self.keys, self.values, selection)
        needed = self._needed(selection)
        self.table.want(needed)
        self._count(needed)
        self._start(self.sealed, needed)
        self._install(self.sealed, needed)
        places = self.table.slot_of.view(self.batch, self.heads, 1, -1)
        ids = selection.cpu().clamp_min(0).view(self.batch, self.heads, -1, selection.shape[2])
        slots = places.expand(-1, -1, ids.shape[2], -1).gather(3, ids).long().view(selection.shape)
        return Resident(self.keys, self.values, slots.to(selection.device))

    def _count(self, needed: Tensor) -> None:
        """Count how the blocks of a selection are met."""
        self.counts.selected += int(needed.sum())
        self.counts.hits += int((needed & (self.table.slot_of >= 0)).sum())
        self.counts.fetched_late += int((needed & (self.table.slot_of == ABSENT)).sum())
        for coming in self.coming:
            used = int(needed[coming.rows, coming.blocks].sum())
            if coming.fetch.is_done:
                self.counts.hits += used
            else:
                self.counts.arrived_late += used

    def _abandon(self) -> None:
        """Forget what is on its way."""
        for coming in self.coming:
            self.table.slot_of[coming.rows, coming.blocks] = ABSENT
            self.counts.bytes_wasted += coming.bytes
        self.coming = []

    def _settle(self, sealed: SealedBlocks) -> None:
        """Put what is on its way into slots, if there still is a slot for each."""
        if self.table.slot_of.shape[1] > self.aim_blocks:
            self._abandon()
        self._install(sealed, self.aim)

    # The batch and the length

    def crop(self, length: int) -> None:
        if length >= self.length:
            return
        sealed, opened = self.sealed, length // self.block_size
        if sealed is not None:
            self._abandon()
            if length % self.block_size and opened < sealed.count:  # a sealed block is open again
                self.open_slots = self.wait(
                    torch.full((self.batch, self.heads, 1), opened, dtype=torch.int64, device="cpu")
                ).slots.flatten()
            sealed.crop(opened)
            self.table.crop(num_blocks(length, self.block_size))
        self.length = length

    def select(self, rows: Tensor) -> None:
        rows = rows.cpu()
        if rows.dtype == torch.bool:
            rows = rows.nonzero().flatten()
        if self.sealed is not None:
            self._settle(self.sealed)
            heads = (rows[:, None] * self.heads + torch.arange(self.heads, device="cpu")).flatten()
            self.table.select(heads)
            self.open_slots = self.open_slots[heads]
            self.sealed.select(rows)
        on_device = rows.to(self.keys.device)
        self.keys, self.values = self.keys[on_device].contiguous(), self.values[on_device].contiguous()

    def repeat(self, times: int) -> None:
        self.select(torch.arange(self.batch, device="cpu").repeat_interleave(times))

    def fork(self, counts: LayerCounts) -> "TieredStore":
        """Return a second store with the same content: sealed blocks are shared, the slots are copied."""
        other = TieredStore(self.block_size, self.slots, self.backing, counts, self.layer)
        if self.sealed is not None:
            self._settle(self.sealed)
            other.sealed = self.sealed.fork()
        other.length, other.keys, other.values = self.length, self.keys.clone(), self.values.clone()
        other.table, other.open_slots = self.table.copy(), self.open_slots.clone()
        return other

    def __deepcopy__(self, memo: dict[int, Any]) -> "TieredStore":
        """Fork; the counts are copied with the cache."""
        return self.fork(copy.deepcopy(self.counts, memo))

    # To and from a file

    def export(self) -> Export:
        if self.sealed is None:
            return exact_export(self.keys[:, :, : self.length], self.values[:, :, : self.length], self.block_size)
        left, sealed = self.length % self.block_size, self.sealed
        opened = [self._open(x)[:, :, :left] if left else x[:, :, :0] for x in (self.keys, self.values)]
        return Export(self.backing.codec, sealed.records.unit_bytes, sealed.units(), *opened)

    def adopt(self, sealed: SealedBlocks, keys: Tensor, values: Tensor) -> None:
        """Begin with what a saved store was: with its slots empty, or, where it had not spilled, with none of it sealed.

        The latter only if sealing would round: then `sealed` is not of this store's backing, and no larger than fast memory.
        """
        self.clear()
        if sealed.backing is not self.backing:
            step = self.piece_tokens // self.block_size
            for piece in sealed.pieces(sealed.count, step, keys.device, self.counts):
                self.append(*piece)
        else:
            self.keys, self.values = (x.new_zeros(*x.shape[:2], 0, x.shape[3]) for x in (keys, values))
            self.length = sealed.count * self.block_size
            self.sealed, self.table = sealed, SlotTable(self.batch * self.heads, 0)
            self.table.add_blocks(sealed.count)
            self.open_slots = torch.zeros(self.batch * self.heads, dtype=torch.int64, device="cpu")
            self._resize(self.slots(self.length + keys.shape[2]))
        if keys.shape[2]:
            self.append(keys, values)

    # Sizes

    def block_bytes(self) -> int:
        return self.block_size * (self.keys.shape[3] + self.values.shape[3]) * self.keys.element_size()

    def key_bytes(self) -> int:
        return self.length * self.batch * self.heads * self.keys.shape[3] * self.keys.element_size()

    def bytes(self) -> int:
        return self.length * self.batch * self.heads * self.block_bytes() // self.block_size

    def _pool_bytes(self) -> int:
        return sum(x.numel() * x.element_size() for x in (self.keys, self.values))

    def fast_bytes(self) -> int:
        return self._pool_bytes() + self.table.bytes() + (self.sealed.table_bytes() if self.sealed is not None else 0)
