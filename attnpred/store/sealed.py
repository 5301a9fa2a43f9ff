"""`SealedBlocks`: the full blocks of one layer in the slow tier: written once, read back in whole blocks or head by head.

A *unit* is one block of one kv head, encoded (`attnpred.store.codec`); the units of a block's heads are one record
(`attnpred.store.records`). What comes back is compared with its check value, and read once more before it is an error
that names layer, block and file.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from attnpred.errors import StoreError
from attnpred.store.backing import Backing
from attnpred.store.codec import CODECS, Codec, checks
from attnpred.store.export import blocks_per_piece
from attnpred.store.fetch import Fetch
from attnpred.store.records import Records
from attnpred.store.tier import buffer
from attnpred.telemetry import LayerCounts


@dataclass(frozen=True, slots=True)
class Coming:
    """Units on their way: batch row and kv head together, block, place and check value of each, [n], by their places."""

    rows: Tensor
    blocks: Tensor
    places: Tensor
    checks: Tensor
    fetch: Fetch

    @property
    def bytes(self) -> int:
        """Bytes that are fetched."""
        return self.fetch.data.numel()


@final
class SealedBlocks:
    """Blocks 0 to `count` of every batch row; keys and values as in `attnpred.store.base`."""

    def __init__(
        self, backing: Backing, block_size: int, codec: Codec, records: Records, ids: Tensor, layer: int
    ) -> None:
        self.backing, self.block_size, self.codec, self.records = backing, block_size, codec, records
        self.ids, self.layer = ids, layer

    @classmethod
    def begin(cls, backing: Backing, block_size: int, keys: Tensor, values: Tensor, layer: int) -> "SealedBlocks":
        """Return none yet, for keys [B, Hkv, T, D] and values [B, Hkv, T, Dv] of this kind."""
        codec = CODECS[backing.codec](block_size, keys.shape[3], values.shape[3], keys.dtype)
        records = Records(backing.tier, keys.shape[1], codec.unit_bytes)
        return cls(
            backing, block_size, codec, records, torch.empty(keys.shape[0], 0, dtype=torch.int64, device="cpu"), layer
        )

    @classmethod
    def adopt(
        cls, backing: Backing, block_size: int, keys: Tensor, values: Tensor, layer: int, place: int, checks: Tensor
    ) -> "SealedBlocks":
        """Return those that a saved cache has at `place` of the backing's tier, in the order of `units`.

        checks int32 [B, N, Hkv]; keys and values are of their kind, as in `begin`.
        """
        sealed = cls.begin(backing, block_size, keys, values, layer)
        sealed.ids = sealed.records.adopt(place, checks.flatten(0, 1)).view(checks.shape[:2])
        return sealed

    @property
    def is_exact(self) -> bool:
        """True where blocks come back bit by bit as they were."""
        return self.backing.codec is None

    @property
    def count(self) -> int:
        """Sealed blocks."""
        return self.ids.shape[1]

    @property
    def batch(self) -> int:
        """B."""
        return self.ids.shape[0]

    @property
    def heads(self) -> int:
        """Hkv."""
        return self.records.units

    def write(self, keys: Tensor, values: Tensor, counts: LayerCounts) -> Tensor:
        """Seal the next whole blocks; return what was written, uint8 [B * n * Hkv, unit]."""
        keys, values = (x.unflatten(2, (-1, self.block_size)).transpose(1, 2).flatten(0, 2) for x in (keys, values))
        units = self.codec.encode(keys, values)
        seals = checks(units).view(-1, self.heads).cpu()
        ids = self.records.take(seals.shape[0])
        try:
            self.records.write(ids, units.view(seals.shape[0], -1).cpu(), seals)
        except BaseException:
            self.records.drop(ids)
            raise
        self.ids = torch.cat((self.ids, ids.view(self.batch, -1)), 1)
        counts.bytes_written += units.numel()
        return units

    def decode(self, units: Tensor, blocks: int) -> tuple[Tensor, Tensor]:
        """Return keys and values [B, Hkv, blocks * P, D] of units [B * blocks * Hkv, unit]."""
        shape = (self.batch, blocks, self.heads)
        keys, values = (
            x.unflatten(0, shape).transpose(1, 2).flatten(2, 3) for x in self.codec.decode(units)
        )  # fmt: skip
        return keys, values

    def start_blocks(self, first: int, last: int, device: torch.device, counts: LayerCounts) -> Coming:
        """Begin to read the blocks `first` to `last` of all heads."""
        ids = self.ids[:, first:last].flatten()
        places = self.records.address[ids]
        order = places.argsort(stable=True)
        size = self.records.record_bytes
        fetch = self.backing.fetcher.start(places[order], size, self.records.unit_bytes, device)
        counts.bytes_streamed += ids.numel() * size
        units = places[order][:, None] + torch.arange(self.heads, device="cpu") * self.records.unit_bytes
        blocks = (first + order % (last - first)).repeat_interleave(self.heads)
        rows = (order[:, None] // (last - first) * self.heads + torch.arange(self.heads, device="cpu")).flatten()
        return Coming(rows, blocks, units.flatten(), self.records.checks[ids[order]].flatten(), fetch)

    def finish_blocks(self, coming: Coming, counts: LayerCounts) -> tuple[Tensor, Tensor]:
        """Return keys and values [B, Hkv, n * P, D] of what `start_blocks` began to read."""
        units = self.finish(coming, counts)
        blocks = units.shape[0] // (self.batch * self.heads)
        order = (coming.rows // self.heads * blocks + coming.blocks - coming.blocks.min()) * self.heads
        order += coming.rows % self.heads
        if not bool((order[1:] > order[:-1]).all()):
            units = units[order.argsort().to(units.device)]
        return self.decode(units, blocks)

    def pieces(
        self, last: int, step: int, device: torch.device, counts: LayerCounts
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield keys and values [B, Hkv, n * P, D] of the blocks before `last`, `step` blocks a piece; reads one ahead."""
        coming: list[Coming] = []
        for first in range(0, last, step):
            coming.append(self.start_blocks(first, min(first + step, last), device, counts))
            if len(coming) > 1:
                yield self.finish_blocks(coming.pop(0), counts)
        while coming:
            yield self.finish_blocks(coming.pop(0), counts)

    def units(self) -> Iterator[Tensor]:
        """Yield all units as they were written, for an `Export`."""
        counts, host = LayerCounts(), torch.device("cpu")  # saving is no decoding, and not counted
        step, heads = blocks_per_piece(self.records.record_bytes), torch.arange(self.heads, device="cpu")
        for row in range(self.batch):
            for first in range(0, self.count, step):
                blocks = torch.arange(first, min(first + step, self.count), device="cpu")
                rows = (row * self.heads + heads).repeat(blocks.numel())
                coming = self.start_units(rows, blocks.repeat_interleave(self.heads), host, counts)
                yield self.finish(coming, counts)[(coming.blocks * self.heads + coming.rows).argsort()]

    def start_units(self, rows: Tensor, blocks: Tensor, device: torch.device, counts: LayerCounts) -> Coming:
        """Begin to fetch the units of `rows` (batch row * Hkv + kv head) and `blocks`, both [n]."""
        ids, heads = self.ids[rows // self.heads, blocks], rows % self.heads
        places = self.records.address[ids] + heads * self.records.unit_bytes
        order = places.argsort()
        rows, blocks, places, ids, heads = rows[order], blocks[order], places[order], ids[order], heads[order]
        size = self.records.unit_bytes
        fetch = self.backing.fetcher.start(places, size, size, device)
        counts.bytes_fetched += rows.numel() * size
        return Coming(rows, blocks, places, self.records.checks[ids, heads], fetch)

    def finish(self, coming: Coming, counts: LayerCounts) -> Tensor:
        """Wait, and return the units [n, unit], each as it was written. Raises `StoreError`."""
        try:
            found = coming.fetch.finish(self.backing.timeout)
            units = coming.fetch.data.view(-1, self.records.unit_bytes)
            bad = (found != coming.checks).nonzero().flatten().tolist()
        except StoreError as error:
            if not coming.fetch.is_done:  # it hangs: asking again would hang as well
                raise StoreError(f"layer {self.layer}, block {int(coming.blocks[0])} or later: {error}") from error
            units = coming.fetch.data.view(-1, self.records.unit_bytes)
            bad = list(range(units.shape[0]))
        for unit in bad:
            counts.retries += 1
            units[unit] = self._again(coming, unit).to(units.device)
        return units

    def _again(self, coming: Coming, unit: int) -> Tensor:
        where = f"layer {self.layer}, block {int(coming.blocks[unit])}"
        data = torch.empty(1, self.records.unit_bytes, dtype=torch.uint8, device="cpu")
        try:
            self.backing.tier.read(int(coming.places[unit]), [buffer(data)])
        except StoreError as error:
            raise StoreError(f"{where}: {error}") from error
        if int(checks(data)) != int(coming.checks[unit]):
            raise StoreError(
                f"{where}: got other bytes from {self.backing.tier.describe()} than were written there, expected them "
                "unchanged: the file was changed, or the device is failing"
            )
        return data[0]

    def crop(self, blocks: int) -> None:
        """Forget the blocks from `blocks` on."""
        self.records.drop(self.ids[:, blocks:])
        self.ids = self.ids[:, :blocks]

    def select(self, rows: Tensor) -> None:
        """Make the batch `rows` [B'] of the old one; blocks are shared, not copied."""
        old, self.ids = self.ids, self.ids[rows]
        self.records.share(self.ids)
        self.records.drop(old)

    def fork(self) -> "SealedBlocks":
        """Return the same blocks for a second store; nothing is copied."""
        self.records.share(self.ids)
        self.records.holders += 1
        return SealedBlocks(self.backing, self.block_size, self.codec, self.records, self.ids.clone(), self.layer)

    def __del__(self) -> None:
        self.records.holders -= 1
        if self.records.holders:  # otherwise all places go with the tier
            self.records.drop(self.ids)

    def table_bytes(self) -> int:
        """Bytes of fast memory that it holds."""
        return self.ids.numel() * 8 + self.records.bytes()
