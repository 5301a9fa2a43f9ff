"""`Records`: where the sealed blocks of one layer lie in a tier. Shared by the stores of a cache and of its forks.

A *record* is one block of one batch row: the encoded keys and values (a *unit*) of its kv heads, one after the other. It is
written once and never changed; several batch rows (beams) and several forks may use it, and when the last one drops it,
its place is written anew. Records are taken from *segments*, stretches of about a megabyte, so that blocks that follow each
other in the text mostly follow each other in the file: a piece of a dense pass is then one long read.

`checks` holds a check value of every unit, in fast memory: what comes back from a tier is compared with it.
"""

import heapq
from collections.abc import Iterator
from typing import final

import torch
from torch import Tensor

from attnpred.store.tier import Tier, buffer

SEGMENT_BYTES = 1 << 20


@final
class Records:
    """address [n]: of each record; users [n]: how many batch rows use it; checks [n, units]."""

    def __init__(self, tier: Tier, units: int, unit_bytes: int) -> None:
        self.tier, self.units, self.unit_bytes = tier, units, unit_bytes
        self.record_bytes = units * unit_bytes
        self.per_segment = max(1, SEGMENT_BYTES // self.record_bytes)
        self.address = torch.empty(0, dtype=torch.int64, device="cpu")
        self.users = torch.empty(0, dtype=torch.int32, device="cpu")
        self.checks = torch.empty(0, units, dtype=torch.int32, device="cpu")
        self.free: list[int] = []
        self.begins: set[int] = set()  # places of segments: no write crosses one
        self.holders = 1
        """Stores that use them."""

    def take(self, count: int) -> Tensor:
        """Return the ids of `count` records to be written, each with one user. Raises `TierFullError`."""
        while len(self.free) < count:
            self._extend(self.tier.allocate(self.per_segment * self.record_bytes), self.per_segment)
        ids = torch.tensor([heapq.heappop(self.free) for _ in range(count)], dtype=torch.int64, device="cpu")
        self.users[ids] = 1
        return ids

    def _extend(self, place: int, count: int) -> None:
        known = self.address.numel()
        self.begins.add(place)
        self.address = torch.cat((self.address, place + torch.arange(count, device="cpu") * self.record_bytes))
        self.users = torch.cat((self.users, torch.zeros(count, dtype=torch.int32, device="cpu")))
        self.checks = torch.cat((self.checks, torch.zeros(count, self.units, dtype=torch.int32, device="cpu")))
        for record in range(known, known + count):
            heapq.heappush(self.free, record)

    def adopt(self, place: int, checks: Tensor) -> Tensor:
        """Take over records of a saved cache, one after the other from `place` on, checks [n, units]; return their ids."""
        assert not self.free
        self._extend(place, checks.shape[0])
        ids = torch.tensor(self.free, dtype=torch.int64, device="cpu")
        self.free = []
        self.checks[ids] = checks
        self.users[ids] = 2  # the file is a user that never drops them: nothing is written there
        return ids

    def write(self, ids: Tensor, data: Tensor, checks: Tensor) -> None:
        """Write records `ids` [n]: data uint8 [n, record_bytes] in host memory, checks [n, units]."""
        self.checks[ids] = checks
        for first, last, place in self._runs(ids):
            self.tier.write(place, buffer(data[first:last]))

    def _runs(self, ids: Tensor) -> Iterator[tuple[int, int, int]]:
        """Yield (first, last, place) of stretches of `ids` that lie one after the other."""
        places, first = self.address[ids].tolist(), 0
        for i in range(1, len(places) + 1):
            if i == len(places) or places[i] != places[i - 1] + self.record_bytes or places[i] in self.begins:
                yield first, i, places[first]
                first = i

    def share(self, ids: Tensor) -> None:
        """Count one user more for every mention of a record in `ids`."""
        flat = ids.flatten()
        self.users.index_add_(0, flat, torch.ones(flat.numel(), dtype=torch.int32, device="cpu"))

    def drop(self, ids: Tensor) -> None:
        """Count one user less for every mention; records that nobody uses are free."""
        flat = ids.flatten()
        self.users.index_add_(0, flat, torch.full((flat.numel(),), -1, dtype=torch.int32, device="cpu"))
        for record in flat.unique()[self.users[flat.unique()] == 0].tolist():
            heapq.heappush(self.free, record)

    def bytes(self) -> int:
        """Bytes of fast memory that it holds."""
        return self.address.numel() * (8 + 4 + 4 * self.units)
