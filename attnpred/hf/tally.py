"""What an attached model has read so far: the counters of all its caches, and the calls that were not sparse."""

from typing import Any

from attnpred import telemetry
from attnpred.hf.cache import TieredCache


class Tally:
    """The sums over all `generate` calls since the last reset."""

    def __init__(self) -> None:
        self._caches: list[dict[int, telemetry.LayerCounts]] = []
        self._fast_bytes = 0
        self._slow_bytes: dict[str, int] = {}
        self._saved_bytes: int | None = None
        self._not_sparse: dict[str, int] = {}

    def add(self, cache: TieredCache) -> None:
        """Count what `cache` has read; a cache that is known already goes on counting by itself."""
        counts = {index: decoder.counts for index, decoder in cache.decoders.items()}
        known = {id(count) for earlier in self._caches for count in earlier.values()}
        if not known & {id(count) for count in counts.values()}:
            self._caches.append(counts)
        self._fast_bytes = max(self._fast_bytes, cache.fast_bytes())
        if cache.sharing is not None:
            self._saved_bytes = max(self._saved_bytes or 0, cache.sharing.saved_bytes())
        slow = {} if cache.backing is None else cache.backing.tier.used()
        self._slow_bytes |= {kind: max(size, self._slow_bytes.get(kind, 0)) for kind, size in slow.items()}

    def add_not_sparse(self, why: str) -> None:
        """Count a call that could not use a cache of ours."""
        self._not_sparse[why] = self._not_sparse.get(why, 0) + 1

    def report(self) -> dict[str, Any]:
        """Return plain numbers; see `Attached.stats`."""
        indices = sorted({index for counts in self._caches for index in counts})
        result = telemetry.report([telemetry.total([c[i] for c in self._caches if i in c]) for i in indices], indices)
        result["fast_bytes"] = self._fast_bytes
        result["not_sparse"] = dict(self._not_sparse)
        if self._saved_bytes is not None:
            result["saved_bytes"] = self._saved_bytes
        return result | ({"slow_bytes": dict(self._slow_bytes)} if self._slow_bytes else {})
