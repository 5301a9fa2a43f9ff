"""`SharedPool`: one layer in fast memory that keeps its own distant keys only for the kv heads that lead their group.

For PoD (`attnpred.kernels.shared`). Values are kept for every head and token. Of a head that follows a lower layer, keys
are kept for the sinks and the recent window alone, and dropped once they leave it; its distant keys are those of the
lower layer, which lie in that layer's store, once for the whole group. `CROP` tokens more than the window are kept, so
that drafted tokens can be taken back; more than that cannot be, and is refused.

To a policy that selects, it is a store like any other: a block read by `wait` is put together from both layers.

Where the policy evicts, blocks are freed here too: a head's values when it gives them back, keys when every head that
takes them has. Then a layer that only leads is one of these as well, and knows who follows it.
"""

from collections.abc import Iterator, Sequence
from typing import Any, final

import torch
from torch import Tensor

from attnpred.errors import CacheFileError, ConfigError
from attnpred.kernels.shared import Part, Split
from attnpred.shapes import num_blocks
from attnpred.store.base import Piece, Resident, Store
from attnpred.store.evictable import Evictable
from attnpred.store.export import Export
from attnpred.store.growing import Growing, gathered
from attnpred.store.pool import BlockPool
from attnpred.store.sealed import SealedBlocks

CROP = 64
"""Tokens that can be taken back."""


@final
class SharedPool(Store):
    """leaders: for each kv head the store of the layer whose distant keys it takes, or None where it has its own.

    evicts: blocks can be given back (`release`); otherwise that does nothing.
    """

    queries_alike = 1  # what is near to one query is distant to a later one

    def __init__(
        self,
        block_size: int,
        leaders: "Sequence[BlockPool | SharedPool | None]",
        split: Split,
        *,
        evicts: bool = False,
    ) -> None:
        self.block_size, self.leaders, self.split = block_size, tuple(leaders), split
        self.own = [head for head, leader in enumerate(leaders) if leader is None]
        self.following = [head for head, leader in enumerate(leaders) if leader is not None]
        self.followers: list[SharedPool] = []
        for leader in self._led_by():
            leader.followers.append(self)
        self._values: Growing | Evictable = Evictable(block_size) if evicts else Growing()  # of all heads
        self._keys: Growing | Evictable = Evictable(block_size) if evicts else Growing()  # of those that lead
        self._sinks, self._recent = Growing(spare=0), Growing()  # keys of those that follow
        self.clear()

    def clear(self) -> None:
        self.length = 0
        self.first: Tensor | None = None  # where each row begins, if rows are padded
        for part in (self._values, self._keys, self._sinks, self._recent):
            part.clear()

    @property
    def batch(self) -> int:
        return self._values.batch

    @property
    def heads(self) -> int:
        return len(self.leaders) if self.length else 0

    @property
    def values(self) -> Tensor:
        """[B, Hkv, L, Dv]. Raises `StoreError` after blocks were given back."""
        return self._values.view()

    def append(self, keys: Tensor, values: Tensor) -> None:
        self._values.append(values)
        if self.own:
            self._keys.append(keys[:, self.own])
        self._recent.append(keys[:, self.following])
        self.length += keys.shape[2]

    def settle(self, first: Tensor | None) -> None:
        """Drop what is distant to every later query; first [B]: where each row begins, None: all at 0."""
        self.first = first
        stop = min(self.length, self.split.sinks + (0 if first is None else int(first.max())))
        if stop > self._sinks.stop:
            start = self._sinks.stop - self._recent.start
            self._sinks.append(self._recent.view()[:, :, start : stop - self._recent.start])
        needed = max(self._sinks.stop, self.length - self.split.recent - CROP)
        if needed - self._recent.start >= CROP or self._recent.start < self._sinks.stop:
            self._recent.drop(needed, self.split.recent + 2 * CROP)

    def near(self) -> list[Part]:
        """Return the own keys, of successive tokens each, of the heads that follow: sinks and recent."""
        return [Part(one.start, one.view()) for one in (self._sinks, self._recent) if one.length]

    def distant(self, first: int, last: int) -> Tensor:
        """Return the distant keys of the heads `first` to `last`, which share a leader, [B, H, L, D]."""
        leader = self.leaders[first]
        if isinstance(leader, SharedPool):
            return leader.distant(first, last)
        if leader is not None:
            return leader.view()[0][:, first:last]
        start = self.own.index(first)
        return self._keys.of(slice(start, start + last - first))

    def _led_by(self) -> "list[SharedPool]":
        """Return the stores whose keys are taken here, and which can free them: each once."""
        return list({id(leader): leader for leader in self.leaders if isinstance(leader, SharedPool)}.values())

    def release(self, kept: Tensor) -> None:
        if isinstance(self._values, Evictable):
            self._values.release(kept)
            for store in (self, *self._led_by()):
                store._release_keys()

    def _release_keys(self) -> None:
        """Free the keys that no head needs, of this layer or of one that follows it."""
        if not self.own or not isinstance(self._keys, Evictable):
            return
        blocks = num_blocks(self.length, self.block_size)
        needed = self._values.left(blocks)
        if needed is None:
            return
        needed = needed[:, self.own]
        for follower in self.followers:
            taken = [i for i, head in enumerate(self.own) if follower.leaders[head] is self]
            left = follower._values.left(blocks)
            if left is None:  # it has not chosen yet
                needed[:, taken] = True
            else:
                needed[:, taken] |= left[:, [self.own[i] for i in taken]]
        ids = torch.arange(blocks, device=needed.device).expand_as(needed)
        self._keys.release(ids.masked_fill(~needed, -1))

    def runs(self) -> list[tuple[int, int]]:
        """Return the kv heads, [first, last), that lie side by side and take distant keys from one layer."""
        edges = [h for h in range(1, len(self.leaders)) if self.leaders[h] is not self.leaders[h - 1]]
        return list(zip([0, *edges], [*edges, len(self.leaders)], strict=True))

    def _put_together(self, start: int, stop: int) -> Tensor:
        """Return keys [B, Hkv, stop - start, D], the layer's own where they are near to the last token."""
        keys = torch.cat([self.distant(*run)[:, :, start:stop] for run in self.runs()], 1)
        places = torch.arange(start, stop, device=keys.device)
        last = torch.tensor([self.length - 1], device=keys.device, dtype=torch.int64)
        is_near = Split(self.split.sinks, self.split.recent, self.first).near(last, places)[:, 0]  # [B or 1, T]
        for part in self.near():
            low, high = max(start, part.start), min(stop, part.start + part.keys.shape[2])
            if low < high:
                own = part.keys[:, :, low - part.start : high - part.start]
                shown = is_near[:, None, low - start : high - start, None]
                found = keys[:, self.following, low - start : high - start]
                keys[:, self.following, low - start : high - start] = torch.where(shown, own, found)
        return keys

    def pieces(self) -> Iterator[Piece]:
        for start in range(0, self.length, self.piece_tokens):
            stop = min(start + self.piece_tokens, self.length)
            yield Piece(start, self._put_together(start, stop), self.values[:, :, start:stop])

    def keys_of(self, first: int, last: int) -> Tensor:
        """Return the keys that the blocks will have once they are distant."""
        tokens = torch.arange(first * self.block_size, last * self.block_size, device=self._recent.device)
        runs = [tokens.expand(self.batch, end - begin, -1) for begin, end in self.runs()]
        return torch.cat([self._distant_tokens(*run, one) for run, one in zip(self.runs(), runs, strict=True)], 1)

    def view(self) -> tuple[Tensor, Tensor]:
        return self._put_together(0, self.length), self.values

    def request(self, selection: Tensor) -> None:
        """Do nothing: every block is there."""

    def wait(self, selection: Tensor) -> Resident:
        return self.wait_at(selection, self.length)

    def wait_at(self, selection: Tensor, length: int) -> Resident:
        """Return copies of the selected blocks alone, one behind the other."""
        if isinstance(self._values, Evictable):
            self._values.require(selection)
        batch, selecting, count = selection.shape
        size, device = self.block_size, selection.device
        inside = torch.arange(size, device=device)
        tokens = (selection.clamp_min(0)[..., None] * size + inside).flatten(2).clamp_max(self.length - 1)
        group = selecting // len(self.leaders)
        keys = []
        for first, last in self.runs():
            wanted = tokens[:, first * group : last * group]
            found = self._distant_tokens(first, last, wanted)
            if self.leaders[first] is not None:
                begin = self.following.index(first)
                ages = length - 1 - wanted
                begins = 0 if self.first is None else self.first[:, None, None]
                for part, is_near in (
                    (self._recent, (ages < self.split.recent) & (wanted >= self._recent.start)),
                    (self._sinks, (wanted < begins + self.split.sinks) & (wanted < self._sinks.stop)),
                ):
                    if part.length:
                        own = part.view()[:, begin : begin + last - first]
                        places = (wanted - part.start).clamp(0, part.length - 1)
                        found = torch.where(is_near[..., None], gathered(own, places), found)
            keys.append(found)
        slots = torch.arange(count, device=device).expand(batch, selecting, count)
        return Resident(torch.cat(keys, 1), self._values.gather(tokens, slice(None)), slots)

    def _distant_tokens(self, first: int, last: int, tokens: Tensor) -> Tensor:
        """Return the distant keys of `tokens` [B, H', T] for the heads `first` to `last`, [B, H', T, D]."""
        leader = self.leaders[first]
        if isinstance(leader, SharedPool):
            return leader._distant_tokens(first, last, tokens)
        if leader is not None:
            return gathered(leader.view()[0][:, first:last], tokens)
        start = self.own.index(first)
        return self._keys.gather(tokens, slice(start, start + last - first))

    def check_crop(self, length: int) -> None:
        """Raise `ConfigError` where own keys that the context of `length` needs have been dropped."""
        sinks = self._sinks.stop
        if length > sinks and self._recent.start > max(sinks, length - self.split.recent):
            raise ConfigError(
                f"got a crop from {self.length} to {length} tokens, expected at most {CROP} fewer: layers that share keys "
                "have dropped their own; begin anew, or attach without layer_groups"
            )

    def crop(self, length: int) -> None:
        self.check_crop(length)
        for part in (self._values, self._keys, self._sinks, self._recent):
            part.crop(length)
        self.length = min(self.length, length)
        if not length:
            self.clear()

    def select(self, rows: Tensor) -> None:
        self._each("select", rows)
        self.first = None if self.first is None else self.first[rows.to(self.first.device)]

    def repeat(self, times: int) -> None:
        self._each("repeat", times)
        self.first = None if self.first is None else self.first.repeat_interleave(times)

    def _each(self, change: str, how: Any) -> None:
        for part in (self._values, self._keys, self._sinks, self._recent):
            if part.batch:
                getattr(part, change)(how)

    def export(self) -> Export:
        raise CacheFileError(
            "got a cache whose layers share keys, expected one that does not: it cannot be saved; attach without layer_groups"
        )

    def adopt(self, sealed: SealedBlocks, keys: Tensor, values: Tensor) -> None:
        raise CacheFileError("got a saved cache, expected an empty one: layers that share keys cannot be loaded")

    def _key_row(self) -> int:
        """Bytes of one key of one head."""
        return self._recent.row_bytes

    def block_bytes(self) -> int:
        return self.block_size * (self._key_row() + self._values.row_bytes)

    def key_bytes(self) -> int:
        return self.length * self.batch * len(self.leaders) * self._key_row()

    def bytes(self) -> int:
        return self.length * self.batch * len(self.leaders) * self.block_bytes() // self.block_size

    def fast_bytes(self) -> int:
        return sum(part.bytes() for part in (self._values, self._keys, self._sinks, self._recent))

    def saved_bytes(self) -> int:
        """Bytes of keys that lie in other layers alone, and are not held here; none for blocks that were given back."""
        tokens = self.length * len(self.following) * self.batch
        left = self._values.left(num_blocks(self.length, self.block_size))
        if left is not None:
            tokens -= int((~left[:, self.following]).sum()) * self.block_size
        return tokens * self._key_row() - self._sinks.bytes() - self._recent.bytes()
