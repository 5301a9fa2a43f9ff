"""`Evictable`: a tensor [B, H, L, D] that tokens are added to at the end, and of which each head can give blocks back.

It stands in a `SharedPool` for a `Growing` where the policy evicts. Keys and values of a layer are two of them there,
because they are given back apart: values when their own head has chosen, keys when every layer that takes them has. Each
is an `EvictingPool`, which wants two tensors: they are the halves of D here, and put together when they are read.
"""

from typing import Any, final

import torch
from torch import Tensor

from attnpred.store.evicting import EvictingPool, gather_slots
from attnpred.store.growing import gathered


@final
class Evictable:
    """All tokens from the first on; of blocks that were given back there is nothing."""

    start = 0

    def __init__(self, block_size: int) -> None:
        self._pool = EvictingPool(block_size)

    def clear(self) -> None:
        """Forget everything and release the memory."""
        self._pool.clear()

    @property
    def length(self) -> int:
        return self._pool.length

    @property
    def batch(self) -> int:
        return self._pool.batch if self._pool.length else 0

    @property
    def row_bytes(self) -> int:
        """Bytes of one token of one head."""
        return self._pool.block_bytes() // self._pool.block_size

    def view(self) -> Tensor:
        """Return everything, [B, H, L, D]. Raises `StoreError` after blocks were given back."""
        return (
            torch.cat(self._pool.view(), 3) if self._pool.length else torch.empty(0, dtype=torch.float32, device="cpu")
        )

    def of(self, heads: slice) -> Tensor:
        """Return everything of these heads, [B, H', L, D]. Raises `StoreError` if they gave blocks back."""
        slots, size = self._pool.slot_of, self._pool.block_size
        if slots is None or not bool((slots[:, heads] >= 0).all()):
            return torch.cat([half[:, heads] for half in self._pool.view()], 3)
        found = [gather_slots(half[:, heads], slots[:, heads], size) for half in self._halves()]
        return torch.cat(found, 3)[:, :, : self.length]

    def _halves(self) -> tuple[Tensor, Tensor]:
        """Both halves, [B, H, slots * P, D / 2]."""
        return self._pool.keys, self._pool.values

    def gather(self, tokens: Tensor, heads: slice) -> Tensor:
        """Return the `tokens` [B, H', T] of these heads, [B, H', T, D]; anything for those that were given back."""
        slots, size = self._pool.slot_of, self._pool.block_size
        if slots is not None:
            group = tokens.shape[1] // slots[:, heads].shape[1]
            blocks = slots[:, heads].repeat_interleave(group, 1).gather(2, tokens // size)
            tokens = blocks.clamp_min(0) * size + tokens % size
        return torch.cat([gathered(half[:, heads], tokens) for half in self._halves()], 3)

    def left(self, blocks: int) -> Tensor | None:
        """Return which of the first `blocks` blocks are there, bool [B, H, blocks]; None: all."""
        slots = self._pool.slot_of
        if slots is None:
            return None
        later = max(0, blocks - slots.shape[2])
        return torch.nn.functional.pad(slots[..., :blocks] >= 0, (0, later), value=True)

    def release(self, kept: Tensor) -> None:
        """Free the blocks that are not in `kept` [B, H, K], -1 for none."""
        self._pool.release(kept)

    def require(self, selection: Tensor) -> None:
        """Raise `StoreError` if blocks of `selection` [B, H, K] were given back."""
        self._pool.wait(selection)

    def append(self, new: Tensor) -> None:
        """Add tokens, [B, H, T, D]."""
        half = new.shape[3] // 2
        self._pool.append(new[..., :half], new[..., half:])

    def crop(self, stop: int) -> None:
        """Keep the first `stop` tokens. Raises `StoreError` where the last of their blocks was given back."""
        self._pool.crop(stop)

    def select(self, rows: Tensor) -> None:
        """Make the batch `rows` of the old one."""
        self._pool.select(rows)

    def repeat(self, times: int) -> None:
        """Repeat each batch row `times` times, side by side."""
        self._pool.repeat(times)

    def __deepcopy__(self, memo: dict[int, Any]) -> "Evictable":
        other = Evictable(self._pool.block_size)
        other._pool = self._pool.fork()
        return other

    def bytes(self) -> int:
        """Bytes that are taken, those of the room and the table included."""
        return self._pool.fast_bytes()
