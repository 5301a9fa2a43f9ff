"""`Plan`: the decode step of one layer as compiled code does it (`attnpred.kernels.numba_step`), looked up once.

A step of `predicted` with everything in fast memory always does the same to the same tables. A plan knows where they lie.
Before a token it is asked whether they still do (`plan_for`): a cache that was cropped, forked, reordered or loaded, or that
has outgrown its memory, gets a new plan. Afterwards `done` leaves behind what `LayerDecoder.step` would have, so that either
can take the next token. What is asked for and is not plain has no plan.
"""

import weakref
from dataclasses import replace
from operator import is_
from typing import Any, final

import torch

from attnpred.config import CacheConfig
from attnpred.decode import LayerDecoder
from attnpred.policies.predicted import Predicted
from attnpred.policies.select import Zone
from attnpred.predictor.digest import Asked
from attnpred.predictor.fitted import RATE, Fitted
from attnpred.store.base import Store
from attnpred.store.pool import BlockPool

MOST = 8
"""Rows of a batch."""
_INDIFFERENT = (
    "budget", "block_size", "num_sink_tokens", "recent_window", "history", "dense_layers", "layer_budgets", "strict",
    "dense_when_fits", "estimate_rest", "offload_dir", "fast_limit", "host_limit", "disk_limit", "fetch_timeout", "own_sinks", "own_recent",
)  # fmt: skip
"""Settings that may be anything; of the others a plan knows nothing but the defaults."""


def is_plain(decoder: LayerDecoder) -> bool:
    """Return whether the layer's settings and policy are such that its steps can be planned."""
    plain, chooser = CacheConfig(), decoder.chooser
    if decoder.config.is_dense_layer(decoder.layer):
        return False
    as_usual = replace(decoder.config, **{name: getattr(plain, name) for name in _INDIFFERENT}) == plain
    does_usual = chooser.corrects and chooser.is_plain and not chooser.forecasts and decoder.interval == 0
    return as_usual and does_usual and type(decoder.policy) is Predicted and type(decoder.memory) is Fitted


def plan_for(decoder: LayerDecoder, store: Store, heads: int, scale: float) -> "Plan | None":
    """Return the plan for one token more, with `heads` query heads; None where that step is not plain."""
    known = decoder.plan
    if known is not None and known.holds(store, scale):
        return known
    decoder.plan = None
    if type(store) is BlockPool and is_plain(decoder) and _is_in_step(decoder, store) and _is_served(store):
        decoder.plan = Plan(decoder, store, heads, scale)
    return decoder.plan


def _is_in_step(decoder: LayerDecoder, store: Store) -> bool:
    """Return whether rows are not padded, nothing is evicted, and the digests have all that they can have."""
    chooser = decoder.chooser
    is_whole = chooser.first_block is None and chooser.left.kept is None
    return is_whole and bool(0 < decoder.memory.sealed == store.length // store.block_size)


def _is_served(store: BlockPool) -> bool:
    keys, values = store.room()
    return (
        keys.is_cpu
        and keys.shape == values.shape
        and keys.dtype == values.dtype
        and keys.dtype in (torch.float32, torch.bfloat16)
        and keys.shape[0] <= MOST
        and keys.shape[3] % 16 == 0
        and store.block_size % 4 == 0
    )


@final
class Plan:
    """Of one layer of one cache. A copy of the cache makes its own."""

    def __init__(self, decoder: LayerDecoder, store: BlockPool, heads: int, scale: float) -> None:
        from attnpred.kernels.numba_step import Coded, Step  # numba is loaded when it is used, not before

        self._decoder, self._store, self._scale = decoder, store, scale
        memory: Fitted = decoder.memory
        keys, values = store.room()
        self._keys = weakref.ref(keys)  # of a store that is given up nothing is held
        past, codes, to_keys, centre, weights, distances = self._tables = memory.tables_for(self._blocks())
        query = torch.empty(keys.shape[0], heads, keys.shape[3], dtype=torch.float32, device="cpu")
        coded = Coded(memory.digest.for_numba(scale), centre.contiguous(), to_keys.contiguous(), codes)
        self._rest = decoder.rest_terms()
        self._step = Step(
            keys, values, store.block_size, query, scale, coded, past, weights, distances, RATE, self._rest
        )
        self._asked = Asked(query, scale, store.heads, 0)
        self._block_bytes, self._code_bytes = store.block_bytes(), codes[:, :, 0].nbytes
        self.shape = keys.shape[0], keys.shape[1], keys.shape[3]
        """B, Hkv, D."""
        config = decoder.config
        self.key = config.budget, config.block_size, config.num_sink_tokens, config.recent_window
        """Layers with the same have the same zone."""
        self.may_be_dense = config.dense_when_fits
        self.address: int = self._step.fields.ctypes.data
        """Where its fields lie, for `attnpred.kernels.numba_token`."""

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        return None

    def zone(self, length: int) -> Zone:
        """Return the zone of a context of `length` tokens."""
        return self._decoder.chooser.zone(length)

    def _blocks(self) -> int:
        return self._store.length // self._store.block_size + 1

    def holds(self, store: BlockPool, scale: float) -> bool:
        """Return whether everything lies where it did, with room for a token more."""
        memory: Fitted = self._decoder.memory
        return (
            store is self._store
            and _is_in_step(self._decoder, store)
            and store.room()[0] is self._keys()
            and all(map(is_, memory.tables_for(self._blocks()), self._tables))
            and self._decoder.rest_terms() is self._rest
            and scale == self._scale
        )

    def begin(self, zone: Zone) -> None:
        """Get ready for a token that chooses in `zone`."""
        sinks, free, first, blocks = zone.sinks, zone.free, zone.first_recent, zone.blocks
        self._zone = zone
        size = *self.shape[:2], sinks + free + blocks - first
        self._selection = torch.empty(size, dtype=torch.int64, device="cpu")
        self._seen = torch.empty(size, dtype=torch.float32, device="cpu")
        self._step.tell(self._selection, self._seen, sinks, first, blocks, free)

    def done(self) -> None:
        """The token was computed: count it, and have everything as the step leaves it."""
        decoder, store, zone, selection = self._decoder, self._store, self._zone, self._selection
        chooser, memory, size = decoder.chooser, decoder.memory, store.block_size
        store.wrote()
        sealed = zone.length // size
        if sealed != self._asked.blocks:
            self._asked = self._asked._replace(blocks=sealed)
        memory.took(self._asked, zone.blocks)
        chooser.pending, chooser.attended, decoder.seen = None, (zone, selection), self._seen
        chooser.steps += 1
        counts, blocks, rows = decoder.counts, selection.shape[2], self.shape[0] * self.shape[1]
        counts.digest_bytes += sealed * self._code_bytes + decoder.rest_bytes(zone)
        attended = blocks * size - (zone.blocks * size - zone.length)
        full = zone.length * rows * self._block_bytes // size
        counts.count_sparse(zone.length, attended, blocks, blocks * rows * self._block_bytes, full)
