"""`SlotTable`: which block lies in which slot of fast memory. Whole numbers only; knows nothing of keys and values.

One row for each kv head of each batch row. A new block takes the slot whose block was wanted longest ago (least recently
selected), so what is wanted now, or was just asked for, is never evicted.
"""

from typing import final

import torch
from torch import Tensor

ABSENT, COMING = -1, -2
"""In `slot_of`: the block is in the slow tier alone, or on its way."""


@final
class SlotTable:
    """slot_of [R, N]: slot of each block, `ABSENT` or `COMING`; block_in [R, S]: block of each slot, -1 for an empty one."""

    def __init__(self, rows: int, slots: int) -> None:
        self.slot_of = torch.full((rows, 0), ABSENT, dtype=torch.int32, device="cpu")
        self.block_in = torch.full((rows, slots), -1, dtype=torch.int32, device="cpu")
        self.wanted = torch.full((rows, slots), -1, dtype=torch.int32, device="cpu")
        self.clock = 0

    @property
    def slots(self) -> int:
        """S."""
        return self.block_in.shape[1]

    def add_blocks(self, count: int) -> None:
        """Let there be `count` more blocks, all absent."""
        added = torch.full((self.slot_of.shape[0], count), ABSENT, dtype=torch.int32, device="cpu")
        self.slot_of = torch.cat((self.slot_of, added), 1)

    def add_slots(self, count: int) -> None:
        """Let there be `count` more slots, all empty."""
        added = torch.full((self.slot_of.shape[0], count), -1, dtype=torch.int32, device="cpu")
        self.block_in, self.wanted = torch.cat((self.block_in, added), 1), torch.cat((self.wanted, added), 1)

    def want(self, needed: Tensor) -> None:
        """Say that the blocks `needed` [R, N] are wanted now."""
        self.clock += 1
        here = needed.gather(1, self.block_in.clamp_min(0).long()) & (self.block_in >= 0)
        self.wanted.masked_fill_(here, self.clock)

    def place(self, rows: Tensor, blocks: Tensor) -> Tensor:
        """Give a slot to each (row, block), both [n], and return the slots [n]; their old blocks become absent.

        Of a row there may be at most as many as it has slots that are not wanted now.
        """
        order = rows.argsort(stable=True)
        counts = torch.bincount(rows, minlength=self.slot_of.shape[0])
        rank = torch.arange(rows.numel(), device="cpu") - (counts.cumsum(0) - counts)[rows[order]]
        slots = torch.empty_like(rows)
        slots[order] = self.wanted.argsort(1)[rows[order], rank]
        old = self.block_in[rows, slots].long()
        gone = old >= 0
        self.slot_of[rows[gone], old[gone]] = ABSENT
        self.block_in[rows, slots] = blocks.to(torch.int32)
        self.slot_of[rows, blocks] = slots.to(torch.int32)
        self.wanted[rows, slots] = self.clock
        return slots

    def crop(self, blocks: int) -> None:
        """Forget the blocks from `blocks` on."""
        gone = self.block_in >= blocks
        self.block_in.masked_fill_(gone, -1)
        self.wanted.masked_fill_(gone, -1)
        self.slot_of = self.slot_of[:, :blocks].clone()

    def select(self, rows: Tensor) -> None:
        """Make the `rows` [R'] of the old ones."""
        self.slot_of, self.block_in, self.wanted = self.slot_of[rows], self.block_in[rows], self.wanted[rows]

    def copy(self) -> "SlotTable":
        """Return a second table with the same content."""
        other = SlotTable(0, 0)
        other.clock = self.clock
        other.slot_of, other.block_in, other.wanted = (x.clone() for x in (self.slot_of, self.block_in, self.wanted))
        return other

    def bytes(self) -> int:
        """Bytes it holds."""
        return 4 * (self.slot_of.numel() + self.block_in.numel() + self.wanted.numel())
