"""`Chain`: several tiers, the first that has room takes the next stretch. Host memory before a file, for example.

The index of the tier lies in the high bits of a place, so that places still add up within a stretch. Nothing ever moves
from one tier to another.
"""

from collections.abc import Sequence
from contextlib import ExitStack
from typing import final

import torch
from torch import Tensor

from attnpred.errors import TierFullError
from attnpred.store.tier import Tier

PLACE_BITS = 56


@final
class Chain(Tier):
    """The tiers as one; they are its own from now on. A chain cannot be a part of another."""

    def __init__(self, tiers: Sequence[Tier]) -> None:
        self._tiers = tuple(tiers)

    def allocate(self, size: int) -> int:
        errors: list[str] = []
        for index, tier in enumerate(self._tiers):
            try:
                place = tier.allocate(size)
            except TierFullError as error:
                errors.append(str(error))
                if len(errors) == len(self._tiers):
                    raise TierFullError("; ".join(errors)) from error
            else:
                assert place >> PLACE_BITS == 0
                return index << PLACE_BITS | place
        raise TierFullError(f"got {size} bytes for a chain of no tiers, expected at least one: give it some")

    def _find(self, place: int) -> tuple[Tier, int]:
        return self._tiers[place >> PLACE_BITS], place & ((1 << PLACE_BITS) - 1)

    def release(self, place: int, size: int) -> None:
        tier, place = self._find(place)
        tier.release(place, size)

    def write(self, place: int, data: memoryview) -> None:
        tier, place = self._find(place)
        tier.write(place, data)

    def read(self, place: int, buffers: Sequence[memoryview]) -> None:
        tier, place = self._find(place)
        tier.read(place, buffers)

    def read_many(self, places: Tensor, into: Tensor) -> None:
        bounds = torch.arange(len(self._tiers) + 1, device="cpu") << PLACE_BITS
        cuts = torch.searchsorted(places, bounds).tolist()
        for tier, first, last in zip(self._tiers, cuts, cuts[1:], strict=False):
            if last > first:
                tier.read_many(places[first:last] & ((1 << PLACE_BITS) - 1), into[first:last])

    def flush(self) -> None:
        for tier in self._tiers:
            tier.flush()

    def drop_page_cache(self) -> None:
        for tier in self._tiers:
            tier.drop_page_cache()

    def used(self) -> dict[str, int]:
        total: dict[str, int] = {}
        for tier in self._tiers:
            for kind, size in tier.used().items():
                total[kind] = total.get(kind, 0) + size
        return total

    def describe(self) -> str:
        return " and ".join(tier.describe() for tier in self._tiers)

    def close(self) -> None:
        with ExitStack() as stack:  # one that fails does not keep the others open
            for tier in self._tiers:
                stack.callback(tier.close)
