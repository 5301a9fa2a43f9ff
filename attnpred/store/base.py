"""`Store`: where the keys and values of one layer live, as the decode step sees it.

`BlockPool` keeps all of them in fast memory, `TieredStore` a part of them there and the rest in a `Tier`. Both give the
same bits for the same calls: the sparse kernel reads blocks by their slots, the dense one reads `pieces`.

The two verbs of a prefetch: `request` names the blocks of the next step and returns at once, `wait` returns when the blocks
of this step are in fast memory, and says in which slots.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import NamedTuple

from torch import Tensor

from attnpred.store.export import Export
from attnpred.store.sealed import SealedBlocks

PIECE_TOKENS = 1024
"""Tokens of a piece that dense attention takes at once, rounded down (`Store.piece_tokens`)."""


class Piece(NamedTuple):
    """Successive tokens from `start` on: keys [B, Hkv, T, D], values [B, Hkv, T, Dv]; valid until the next is asked for."""

    start: int
    keys: Tensor
    values: Tensor


class Resident(NamedTuple):
    """Fast memory, keys [B, Hkv, slots * P, D] and values [..., Dv], and the slots [B, Hs, K] of a selection."""

    keys: Tensor
    values: Tensor
    slots: Tensor


class Store(ABC):
    """Interface; concrete stores are final.

    You may assume: block ids stay valid until `crop` or `clear`; fast memory is finite everywhere, also past `length`.
    You must: append keys and values of equal length and of the batch, heads and dtypes of the first call; `wait` for what
    you read; not keep what `wait` and `pieces` return over the next call.
    """

    block_size: int
    length: int
    """Tokens."""
    queries_alike: int | None = None
    """To how many successive queries a block has the same keys; None: to all."""

    @property
    @abstractmethod
    def batch(self) -> int:
        """B; 0 before the first tokens."""

    @property
    @abstractmethod
    def heads(self) -> int:
        """Hkv; 0 before the first tokens."""

    @abstractmethod
    def append(self, keys: Tensor, values: Tensor) -> None:
        """Add tokens: keys [B, Hkv, T, D], values [B, Hkv, T, Dv]."""

    @abstractmethod
    def pieces(self) -> Iterator[Piece]:
        """Yield all keys and values in order, `piece_tokens` at a time."""

    def whole(self) -> Piece | None:
        """Return everything as one piece where all of it lies in fast memory anyway, else None."""
        return None

    @abstractmethod
    def keys_of(self, first: int, last: int) -> Tensor:
        """Return the keys of the full blocks `first` to `last`, [B, Hkv, (last - first) * P, D]."""

    @abstractmethod
    def view(self) -> tuple[Tensor, Tensor]:
        """Return all keys and values, [B, Hkv, L, D], in fast memory."""

    @abstractmethod
    def request(self, selection: Tensor) -> None:
        """Begin to fetch the blocks of `selection` [B, Hs, K], -1 for none; those that do not exist yet are left out."""

    @abstractmethod
    def wait(self, selection: Tensor) -> Resident:
        """Return when every block of `selection` is in fast memory; fetch what nobody requested. -1 gets any slot."""

    def wait_at(self, selection: Tensor, length: int) -> Resident:
        """Return what `wait` does, with the keys as the last of `length` tokens sees them."""
        return self.wait(selection)

    def release(self, kept: Tensor) -> None:
        """Of the blocks that exist, only those of `kept` [B, Hkv, K] will be asked for again; -1 is none.

        A store may free the others (`EvictingPool`); most have no need to.
        """

    @abstractmethod
    def crop(self, length: int) -> None:
        """Keep the first `length` tokens."""

    @abstractmethod
    def select(self, rows: Tensor) -> None:
        """Make the batch `rows` of the old one (beams): an index [B'] or a boolean mask."""

    @abstractmethod
    def repeat(self, times: int) -> None:
        """Repeat each batch row `times` times, side by side."""

    @abstractmethod
    def clear(self) -> None:
        """Forget everything and release the memory."""

    @abstractmethod
    def export(self) -> Export:
        """Return what is saved of it; take the pieces before the next call of anything else."""

    @abstractmethod
    def adopt(self, sealed: SealedBlocks, keys: Tensor, values: Tensor) -> None:
        """Begin with what was saved: `sealed`, which is this store's from now on, and the open block's tokens."""

    @abstractmethod
    def block_bytes(self) -> int:
        """Bytes of one block of one head, keys and values."""

    @abstractmethod
    def key_bytes(self) -> int:
        """Bytes of all keys so far, wherever they lie."""

    @abstractmethod
    def bytes(self) -> int:
        """Bytes of all keys and values so far, wherever they lie."""

    @abstractmethod
    def fast_bytes(self) -> int:
        """Bytes of fast memory that are taken, tables included."""

    @property
    def piece_tokens(self) -> int:
        """Tokens of a piece: whole blocks, in sixteens."""
        step = math.lcm(self.block_size, 16)
        return max(1, PIECE_TOKENS // step) * step
