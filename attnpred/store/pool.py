"""`BlockPool`: all keys and values of one layer in fast memory, preallocated and grown by eighths, never concatenated.

Layout: two tensors [B, Hkv, capacity, D], capacity a multiple of the block size, so that block i of a head is the
contiguous tokens [i * P, (i + 1) * P): the slot of a block is its id. Memory past `length` is always finite (zeros, or
tokens removed by `crop`): kernels rely on it.

A fork shares the tensors until one of the two appends, which then makes a copy of its own.

What was saved in a file is read when keys or values are first asked for.
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any, final

import torch
from torch import Tensor

from attnpred.kernels.decoding import HAS_NUMBA
from attnpred.shapes import expect, num_blocks
from attnpred.store.base import Piece, Resident, Store
from attnpred.store.export import Export, exact_export
from attnpred.store.pages import ask_for_huge_pages
from attnpred.store.sealed import SealedBlocks
from attnpred.telemetry import LayerCounts

SPARE = 64
"""Tokens that there is room for behind a prompt."""


@final
class BlockPool(Store):
    """Keys and values of one layer, all of them in fast memory."""

    def __init__(self, block_size: int) -> None:
        self.block_size = block_size
        self.clear()

    def clear(self) -> None:
        """Forget everything and release the memory."""
        self.length = 0
        self._tensors = (
            torch.empty(0, dtype=torch.float32, device="cpu"),
            torch.empty(0, dtype=torch.float32, device="cpu"),
        )
        self._deferred: Callable[[int], tuple[Tensor, Tensor]] | None = None  # reads them, for a context of that length
        self._is_shared = False

    def _filled(self) -> tuple[Tensor, Tensor]:
        """Return keys and values."""
        if self._deferred is not None:
            self._tensors = self._deferred(self.length)
            self._deferred = None
        return self._tensors

    @property
    def keys(self) -> Tensor:
        """[B, Hkv, capacity, D]."""
        return self._filled()[0]

    @property
    def values(self) -> Tensor:
        """[B, Hkv, capacity, Dv]."""
        return self._filled()[1]

    @property
    def batch(self) -> int:
        return self.keys.shape[0] if self.keys.ndim == 4 else 0

    @property
    def heads(self) -> int:
        return self.keys.shape[1] if self.keys.ndim == 4 else 0

    def append(self, keys: Tensor, values: Tensor) -> None:
        tokens, length = keys.shape[2], self.length
        if tokens == 1 and self._is_one_more(keys, values):
            from attnpred.kernels.numba_copy import write_token  # numba is loaded when it is used, not before

            write_token(keys, values, *self._tensors, length)
            self.length = length + 1
            return
        needed = length + tokens
        held_keys, held_values = self._filled()
        if held_keys.numel() == 0:
            held_keys, held_values = (x.new_zeros(*x.shape[:2], 0, x.shape[3]) for x in (keys, values))
        expect("keys", keys, *held_keys.shape[:2], -1, held_keys.shape[3])
        expect("values", values, *held_values.shape[:2], tokens, held_values.shape[3])
        if needed > held_keys.shape[2]:
            capacity = self._capacity(needed)
            held_keys, held_values = self._grown(held_keys, capacity), self._grown(held_values, capacity)
        elif self._is_shared:
            held_keys, held_values = held_keys.clone(), held_values.clone()
        self._tensors, self._is_shared = (held_keys, held_values), False
        held_keys.narrow(2, length, tokens).copy_(keys)
        held_values.narrow(2, length, tokens).copy_(values)
        self.length = needed

    def _is_one_more(self, keys: Tensor, values: Tensor) -> bool:
        """True where a token like those before is added, there is room for it, and numba can write it."""
        held_keys, held_values = self._tensors
        (batch, heads, _, dim), value_dim = keys.shape, values.shape[3]
        return (
            HAS_NUMBA
            and self._deferred is None
            and not self._is_shared
            and held_keys.ndim == 4
            and self.length < held_keys.shape[2]
            and held_keys.is_cpu
            and keys.is_cpu
            and values.is_cpu
            and held_keys.dtype == keys.dtype
            and held_values.dtype == values.dtype
            and (batch, heads, dim) == (held_keys.shape[0], held_keys.shape[1], held_keys.shape[3])
            and (batch, heads, 1, value_dim) == values.shape
            and value_dim == held_values.shape[3]
            and keys.stride()[:2] + keys.stride()[3:] == (heads * dim, dim, 1)
            and values.stride()[:2] + values.stride()[3:] == (heads * value_dim, value_dim, 1)
        )

    def room(self) -> tuple[Tensor, Tensor]:
        """Return keys and values [B, Hkv, capacity, D], its own and with room for a token more, which `wrote` adds."""
        if self._deferred is None and not self._is_shared and self.length < self._tensors[0].shape[2]:
            return self._tensors  # the very same, as long as they are
        keys, values = self._filled()
        if self.length == keys.shape[2]:
            capacity = self._capacity(self.length + 1)
            self._tensors = self._grown(keys, capacity), self._grown(values, capacity)
        elif self._is_shared:
            self._tensors = keys.clone(), values.clone()
        self._is_shared = False
        return self._tensors

    def wrote(self) -> None:
        """Add a token, which was written behind the last."""
        self.length += 1

    def _capacity(self, needed: int) -> int:
        """Return for how many tokens there is to be memory, where there have to be `needed`."""
        wanted = max(needed + SPARE, needed * 9 // 8 if self.length else needed)
        return num_blocks(wanted, self.block_size) * self.block_size

    def _grown(self, old: Tensor, capacity: int) -> Tensor:
        batch, heads, _, dim = old.shape
        new = old.new_zeros(batch, heads, capacity, dim)
        ask_for_huge_pages(new)
        new[:, :, : self.length] = old[:, :, : self.length]
        return new

    def view(self) -> tuple[Tensor, Tensor]:
        """Return all keys and values, [B, Hkv, L, D], without copying."""
        return self.keys[:, :, : self.length], self.values[:, :, : self.length]

    def pieces(self) -> Iterator[Piece]:
        for start in range(0, self.length, self.piece_tokens):
            stop = min(start + self.piece_tokens, self.length)
            yield Piece(start, self.keys[:, :, start:stop], self.values[:, :, start:stop])

    def whole(self) -> Piece:
        return Piece(0, *self.view())

    def keys_of(self, first: int, last: int) -> Tensor:
        return self.keys[:, :, first * self.block_size : last * self.block_size]

    def request(self, selection: Tensor) -> None:
        """Do nothing: every block is there."""

    def wait(self, selection: Tensor) -> Resident:
        return Resident(self.keys, self.values, selection)

    def fork(self) -> "BlockPool":
        """Return a second pool with the same content; nothing is copied before one of the two appends."""
        other = BlockPool(self.block_size)
        other.length, other._tensors, other._deferred = self.length, self._tensors, self._deferred
        self._is_shared = other._is_shared = self._deferred is None  # otherwise each reads its own
        return other

    def __deepcopy__(self, memo: dict[int, Any]) -> "BlockPool":
        return self.fork()

    def crop(self, length: int) -> None:
        self.length = min(self.length, length)

    def select(self, rows: Tensor) -> None:
        rows = rows.to(self.keys.device)
        self._tensors = self.keys[rows].contiguous(), self.values[rows].contiguous()
        self._is_shared = False

    def repeat(self, times: int) -> None:
        self._tensors = self.keys.repeat_interleave(times, 0), self.values.repeat_interleave(times, 0)
        self._is_shared = False

    def export(self) -> Export:
        return exact_export(*self.view(), self.block_size)

    def adopt(self, sealed: SealedBlocks, keys: Tensor, values: Tensor) -> None:
        self.clear()
        self.length = sealed.count * self.block_size + keys.shape[2]
        self._deferred = functools.partial(_read, sealed, keys, values, self.piece_tokens)

    def block_bytes(self) -> int:
        return self.block_size * (
            self.keys.shape[3] * self.keys.element_size() + self.values.shape[3] * self.values.element_size()
        )

    def key_bytes(self) -> int:
        return self.length * self.keys.shape[0] * self.keys.shape[1] * self.keys.shape[3] * self.keys.element_size()

    def fast_bytes(self) -> int:
        return sum(x.numel() * x.element_size() for x in self._tensors)  # what lies in a file is not in fast memory

    def bytes(self) -> int:
        batch, heads = self.keys.shape[:2]
        return self.length * batch * heads * self.block_bytes() // self.block_size


def _read(sealed: SealedBlocks, keys: Tensor, values: Tensor, piece: int, length: int) -> tuple[Tensor, Tensor]:
    """Return the first `length` tokens of what was saved, with room for more; `piece` tokens are read at a time."""
    size, full = sealed.block_size, sealed.count * sealed.block_size
    capacity = num_blocks(length + SPARE, size) * size
    found = tuple(x.new_zeros(*x.shape[:2], capacity, x.shape[3]) for x in (keys, values))
    start, wanted = 0, num_blocks(min(length, full), size)
    for parts in sealed.pieces(wanted, piece // size, keys.device, LayerCounts()):
        for target, part in zip(found, parts, strict=True):
            target[:, :, start : start + part.shape[2]] = part
        start += piece
    for target, part in zip(found, (keys, values), strict=True):
        target[:, :, full:length] = part[:, :, : max(0, length - full)]
    return found[0], found[1]
