"""`Arena`: blocks of all kv heads and rows side by side, for heads that keep different numbers of them.

Two tensors [slots * P, D]; a slot is any place of a block in it, and who owns it is the business of `EvictingPool`. Kernels
are handed a view [B, Hkv, slots * P, D] in which all rows and heads are the same memory (strides of 0), so a head that
keeps everything costs its own blocks, and no other head's. Memory that no token was written to is zeros: it is finite.

A fork shares the tensors until one of the two writes, which then makes a copy of its own.
"""

from typing import final

import torch
from torch import Tensor

SPARE = 64
"""Tokens of each head that there is room for when an arena grows."""


@final
class Arena:
    """Blocks of P = `block_size` tokens for `rows` = B * Hkv heads; `used` slots were taken so far."""

    def __init__(self, block_size: int, batch: int, heads: int, keys: Tensor, values: Tensor) -> None:
        """Begin with the blocks keys [S, P, D] and values [S, P, Dv], in slots 0 to S."""
        self.block_size, self.batch, self.heads = block_size, batch, heads
        self.used = keys.shape[0]
        slots = self.used + self._spare()
        self._tensors = self._grown(keys.flatten(0, 1), slots), self._grown(values.flatten(0, 1), slots)
        self._is_shared = False

    def _spare(self) -> int:
        return self.batch * self.heads * -(-SPARE // self.block_size)

    @property
    def keys(self) -> Tensor:
        """[B, Hkv, slots * P, D], the same memory for every head."""
        return self._tensors[0].expand(self.batch, self.heads, -1, -1)

    @property
    def values(self) -> Tensor:
        """[B, Hkv, slots * P, Dv], the same memory for every head."""
        return self._tensors[1].expand(self.batch, self.heads, -1, -1)

    def take(self, count: int) -> Tensor:
        """Return `count` new slots for every head, [B, Hkv, count]."""
        rows = self.batch * self.heads
        first, self.used = self.used, self.used + rows * count
        if self.used * self.block_size > self._tensors[0].shape[0]:
            slots = max(self.used + self._spare(), self.used * 9 // 8)
            self._tensors = self._grown(self._tensors[0], slots), self._grown(self._tensors[1], slots)
            self._is_shared = False
        device = self._tensors[0].device
        return torch.arange(first, self.used, device=device).view(count, self.batch, self.heads).permute(1, 2, 0)

    def _grown(self, old: Tensor, slots: int) -> Tensor:
        new = old.new_zeros(slots * self.block_size, old.shape[1])
        new[: old.shape[0]] = old
        return new

    def write(self, keys: Tensor, values: Tensor, slots: Tensor, start: int) -> None:
        """Write keys [B, Hkv, T, D] and values from token `start` of the first of the blocks `slots` [B, Hkv, K] on."""
        if self._is_shared:
            self._tensors = self._tensors[0].clone(), self._tensors[1].clone()
            self._is_shared = False
        tokens = torch.arange(start, start + keys.shape[2], device=slots.device)
        places = (slots[..., tokens // self.block_size] * self.block_size + tokens % self.block_size).flatten()
        for held, new in zip(self._tensors, (keys, values), strict=True):
            held.index_copy_(0, places, new.reshape(-1, held.shape[1]).to(held.dtype))

    def fork(self) -> "Arena":
        """Return a second one with the same content; nothing is copied before one of the two writes."""
        other = object.__new__(Arena)
        other.block_size, other.batch, other.heads, other.used = self.block_size, self.batch, self.heads, self.used
        other._tensors, self._is_shared, other._is_shared = self._tensors, True, True
        return other

    def block_bytes(self) -> int:
        """Bytes of one block of one head, keys and values."""
        return self.block_size * sum(x.shape[1] * x.element_size() for x in self._tensors)

    def fast_bytes(self) -> int:
        """Bytes that are allocated."""
        return sum(x.numel() * x.element_size() for x in self._tensors)
