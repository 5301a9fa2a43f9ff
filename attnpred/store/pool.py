"""`BlockPool`: all keys and values of one layer in fast memory, preallocated and grown by halves, never concatenated.

Layout: two tensors [B, Hkv, capacity, D], capacity a multiple of the block size, so that block i of a head is the
contiguous tokens [i * P, (i + 1) * P): the slot of a block is its id. Memory past `length` is always finite (zeros, or
tokens removed by `crop`): kernels rely on it.

A fork shares the tensors until one of the two appends, which then makes a copy of its own.
"""

from collections.abc import Iterator
from typing import Any, final

import torch
from torch import Tensor

from attnpred.shapes import expect, num_blocks
from attnpred.store.base import Piece, Resident, Store


@final
class BlockPool(Store):
    """Keys and values of one layer, all of them in fast memory."""

    def __init__(self, block_size: int) -> None:
        self.block_size = block_size
        self.clear()

    def clear(self) -> None:
        """Forget everything and release the memory."""
        self.length = 0
        self.keys = torch.empty(0)
        self.values = torch.empty(0)
        self._is_shared = False

    @property
    def heads(self) -> int:
        return self.keys.shape[1] if self.keys.ndim == 4 else 0

    def append(self, keys: Tensor, values: Tensor) -> None:
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
        elif self._is_shared:
            self.keys, self.values = self.keys.clone(), self.values.clone()
        self._is_shared = False
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

    def pieces(self) -> Iterator[Piece]:
        for start in range(0, self.length, self.piece_tokens):
            stop = min(start + self.piece_tokens, self.length)
            yield Piece(start, self.keys[:, :, start:stop], self.values[:, :, start:stop])

    def keys_of(self, first: int, last: int) -> Tensor:
        return self.keys[:, :, first * self.block_size : last * self.block_size]

    def request(self, selection: Tensor) -> None:
        """Do nothing: every block is there."""

    def wait(self, selection: Tensor) -> Resident:
        return Resident(self.keys, self.values, selection)

    def fork(self) -> "BlockPool":
        """Return a second pool with the same content; nothing is copied before one of the two appends."""
        other = BlockPool(self.block_size)
        other.length, other.keys, other.values = self.length, self.keys, self.values
        self._is_shared = other._is_shared = True
        return other

    def __deepcopy__(self, memo: dict[int, Any]) -> "BlockPool":
        return self.fork()

    def crop(self, length: int) -> None:
        self.length = min(self.length, length)

    def select(self, rows: Tensor) -> None:
        rows = rows.to(self.keys.device)
        self.keys, self.values = self.keys[rows].contiguous(), self.values[rows].contiguous()
        self._is_shared = False

    def repeat(self, times: int) -> None:
        self._is_shared = False
        self.keys, self.values = self.keys.repeat_interleave(times, 0), self.values.repeat_interleave(times, 0)

    def block_bytes(self) -> int:
        return self.block_size * (
            self.keys.shape[3] * self.keys.element_size() + self.values.shape[3] * self.values.element_size()
        )

    def key_bytes(self) -> int:
        return self.length * self.keys.shape[0] * self.keys.shape[1] * self.keys.shape[3] * self.keys.element_size()

    def fast_bytes(self) -> int:
        return self.keys.numel() * self.keys.element_size() + self.values.numel() * self.values.element_size()

    def bytes(self) -> int:
        batch, heads = self.keys.shape[:2]
        return self.length * batch * heads * self.block_bytes() // self.block_size
