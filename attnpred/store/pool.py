"""`BlockPool`: all keys and values of one layer in fast memory, preallocated and grown by halves, never concatenated.

Layout: two tensors [B, Hkv, capacity, D], capacity a multiple of the block size, so that block i of a head is the
contiguous tokens [i * P, (i + 1) * P). Memory past `length` is always finite (zeros, or tokens removed by `crop`):
kernels rely on it.
"""

from typing import final

import torch
from torch import Tensor

from attnpred.shapes import expect, num_blocks


@final
class BlockPool:
    """Keys and values of one layer.

    You may assume: block ids stay valid until `crop` or `clear`; `keys` and `values` are contiguous.
    You must: append keys and values of equal length and of the batch, heads and dtypes of the first call.
    """

    def __init__(self, block_size: int) -> None:
        self.block_size = block_size
        self.clear()

    def clear(self) -> None:
        """Forget everything and release the memory."""
        self.length = 0
        self.keys = torch.empty(0)
        self.values = torch.empty(0)

    def append(self, keys: Tensor, values: Tensor) -> None:
        """Add tokens: keys [B, Hkv, T, D], values [B, Hkv, T, Dv]."""
        batch, heads, tokens, _ = keys.shape
        needed = self.length + tokens
        if self.keys.numel() == 0:
            self.keys, self.values = (
                keys.new_zeros(batch, heads, 0, keys.shape[-1]),
                values.new_zeros(batch, heads, 0, values.shape[-1]),
            )
        expect("keys", keys, self.keys.shape[0], self.keys.shape[1], -1, self.keys.shape[3])
        expect("values", values, self.values.shape[0], self.values.shape[1], tokens, self.values.shape[3])
        if needed > self.keys.shape[2]:
            capacity = (
                num_blocks(max(needed + 64, needed * 3 // 2 if self.length else needed), self.block_size)
                * self.block_size
            )
            self.keys, self.values = self._grown(self.keys, capacity), self._grown(self.values, capacity)
        self.keys[:, :, self.length : needed] = keys
        self.values[:, :, self.length : needed] = values
        self.length = needed

    def _grown(self, old: Tensor, capacity: int) -> Tensor:
        batch, heads, _, dim = old.shape
        new = old.new_zeros(batch, heads, capacity, dim)
        new[:, :, : self.length] = old[:, :, : self.length]
        return new

    def view(self) -> tuple[Tensor, Tensor]:
        """Return all keys and values, [B, Hkv, L, D], without copying."""
        return self.keys[:, :, : self.length], self.values[:, :, : self.length]

    def crop(self, length: int) -> None:
        """Keep the first `length` tokens."""
        self.length = min(self.length, length)

    def select(self, rows: Tensor) -> None:
        """Make the batch `rows` of the old one (beams): an index [B'] or a boolean mask."""
        rows = rows.to(self.keys.device)
        self.keys, self.values = self.keys[rows].contiguous(), self.values[rows].contiguous()

    def repeat(self, times: int) -> None:
        """Repeat each batch row `times` times, side by side."""
        self.keys, self.values = self.keys.repeat_interleave(times, 0), self.values.repeat_interleave(times, 0)

    def block_bytes(self) -> int:
        """Bytes of one block of one head, keys and values."""
        return self.block_size * (
            self.keys.shape[3] * self.keys.element_size() + self.values.shape[3] * self.values.element_size()
        )

    def key_bytes(self) -> int:
        """Bytes of all keys so far."""
        return self.length * self.keys.shape[0] * self.keys.shape[1] * self.keys.shape[3] * self.keys.element_size()

    def bytes(self) -> int:
        """Bytes of all keys and values so far."""
        batch, heads = self.keys.shape[:2]
        return self.length * batch * heads * self.block_bytes() // self.block_size
