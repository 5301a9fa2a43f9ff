"""The decode step of one attention layer: select, attend, remember, forecast. Knows nothing of any framework above torch.

    step t:  1. blocks: the forecast made at t-1; a policy that needs the query, or corrects with it, (re)scores them now
             2. the store waits until they are in fast memory, and `sparse_decode` reads them: output and block maxima
             3. the maxima, spread over the columns of all blocks, become the next row of the memory; every
                `calibration_interval` steps the row is the true one, computed from all keys
             4. the policy scores the blocks for a context of one token more; the selection is requested, and waits for t+1

What to choose is `choosing.py`; a call of several tokens is dense (`dense_calls.py`).
"""

from collections.abc import Mapping
from typing import Any, final

import torch
from torch import Tensor

from attnpred.choosing import Call, Chooser
from attnpred.config import CacheConfig
from attnpred.dense_calls import DenseCalls, seal
from attnpred.errors import ConfigError
from attnpred.kernels import add_rest
from attnpred.kernels.dense import AttentionTerms
from attnpred.kernels.rest import RestTerms
from attnpred.kernels.streamed import StreamedAttention, StreamedRows
from attnpred.policies.base import Policy
from attnpred.policies.left import Left
from attnpred.policies.select import Zone
from attnpred.predictor.memory import Memory, State, inside, spread
from attnpred.predictor.rest import Rest
from attnpred.rest_rows import RestRows, attend_selected
from attnpred.store.base import Store
from attnpred.telemetry import LayerCounts
from attnpred.truth import count_recovery, true_mass, true_rows


@final
class LayerDecoder:
    """State and step of one attention layer: memory, chooser, counters."""

    def __init__(
        self,
        config: CacheConfig,
        policy: Policy[Any],
        counts: LayerCounts,
        layer: int = 0,
        leader: Memory | None = None,
    ) -> None:
        config = policy.settle(config.for_layer(layer))
        self.config, self.policy, self.counts, self.layer = config, policy, counts, layer
        self.memory: Any = policy.memory(config, layer)
        if leader is not None:
            self.memory.follow(leader)
        wanted = config.calibration_interval
        self.interval = policy.calibration if wanted is None else wanted
        if policy.evicts:
            self.interval = 0  # a true row would need what is gone
            if config.per_query_head or config.union:
                raise ConfigError(
                    f"got {'union' if config.union else 'per_query_head'} with a policy that evicts, expected one selection "
                    "per kv head: leave it out"
                )
        self.chooser = Chooser(config, policy, counts, layer, self.memory)
        self.seen: Tensor | None = None
        """What the last step gave to the blocks of `attended`: the largest probability in each, [B, Hs, K]."""
        self.plan: Any = None
        """How its steps are compiled, if they are (`attnpred.plan`)."""
        estimates = policy.estimates_rest if config.estimate_rest is None else config.estimate_rest
        self.rest = Rest() if estimates else None
        learns = None if self.rest is None else RestRows(self.rest, self.chooser, self.memory)
        self.dense = DenseCalls(config, policy, self.memory, self.chooser, learns)

    def rest_terms(self) -> RestTerms | None:
        """What is known of the rest, if it is estimated and there is anything."""
        return None if self.rest is None else self.rest.terms

    def rest_bytes(self, zone: Zone) -> int:
        """Bytes that a step in `zone` reads of that."""
        return 0 if self.rest is None or zone.covers_all else self.rest.bytes()

    @property
    def left(self) -> Left:
        """What a policy that evicts has left."""
        return self.chooser.left

    @property
    def pending(self) -> tuple[Zone, Tensor] | None:
        """The selection that waits for the next step, and its zone."""
        return self.chooser.pending

    @property
    def attended(self) -> tuple[Zone, Tensor] | None:
        """The selection of the last step, and its zone."""
        return self.chooser.attended

    def fits(self, length: int) -> bool:
        """True where the dense path is to be taken because every block may be attended anyway."""
        return self.chooser.fits(length)

    def observe(
        self,
        query: Tensor,
        store: Store,
        terms: AttentionTerms,
        mask: Tensor | None,
        *,
        prompt: bool,
        keys: Tensor | None = None,
        output: Tensor | None = None,
    ) -> None:
        """Take in a dense call: query [B, Hq, Q, D], already in the store; mask [B, Q, L] or None (causal).

        keys [B, Hkv, L, D]: all of them, where they are at hand (a prompt), so that none is read back. output
        [B, Hq, R, Dv]: of the last R queries or all, for the estimate of what steps leave out.
        """
        if prompt:
            self.chooser.steps = 0
        self.dense.observe(self._call(query, store, terms, mask), keys, output)

    def attend(
        self, query: Tensor, store: Store, terms: AttentionTerms, mask: Tensor | None, *, remember: bool
    ) -> Tensor:
        """Attend to everything: arguments as in `observe`, which this includes if `remember`. Returns [B, Hq, Q, D]."""
        return self.dense.attend(self._call(query, store, terms, mask), remember=remember)

    def step(self, query: Tensor, store: Store, terms: AttentionTerms, mask: Tensor | None) -> Tensor:
        """Attend with one query per row, [B, Hq, D], whose key is already in the store; mask [B, L] or None.

        Returns [B, Hq, D].
        """
        call, chooser = self._call(query, store, terms, mask), self.chooser
        zone = chooser.zone(store.length)
        seal(self.memory, store)
        whole = self.memory.wants_all(query)
        if whole is not None:
            return self._step_whole(whole, call, zone)
        again = chooser.same_blocks(zone)
        if again is not None:
            output, _ = self._attend_to(again, call, zone)
            chooser.pending = None
            if chooser.is_due():
                self.memory.look(query, terms.scale, call.heads)
                chooser.forecast(call)
            return output
        pending = chooser.pending
        is_current = chooser.corrects or pending is None or pending[0].length != store.length
        if is_current:
            self.memory.look(query, terms.scale, call.heads)
            selection = chooser.select(call, zone, is_next=False)
        else:
            assert pending is not None
            selection = pending[1]
        output, maxima = self._attend_to(selection, call, zone)
        self.counts.digest_bytes += self.memory.look_bytes()
        if not is_current:
            self.memory.look(query, terms.scale, call.heads)
        if self.memory.rows:
            self._push(call, zone, selection, maxima)
        chooser.pending = None
        if chooser.is_due():
            chooser.forecast(call)
        return output

    def _call(self, query: Tensor, store: Store, terms: AttentionTerms, mask: Tensor | None) -> Call:
        each = self.config.per_query_head or self.config.union
        return Call(query, store, terms, mask, query.shape[1] if each else store.heads)

    def _attend_to(self, selection: Tensor, call: Call, zone: Zone) -> tuple[Tensor, Tensor]:
        """Attend to the blocks of `selection`, and count it: output [B, Hq, D] and block maxima [B, Hs, K]."""
        output, maxima = self._sparse(selection, call, zone)
        self._count(call, zone, selection)
        self.chooser.attended, self.seen = (zone, selection), maxima
        return output, maxima

    def _sparse(self, selection: Tensor, call: Call, zone: Zone) -> tuple[Tensor, Tensor]:
        """Return the attention [B, Hq, D] to the blocks of `selection` [B, Hs, K], and its block maxima [B, Hs, K].

        With an estimate of the rest, if there is one: then the maxima are shares of everything.
        """
        output, maxima, normaliser = attend_selected(selection, call, call.store.length)
        rest = None if zone.covers_all else self.rest_terms()
        if rest is None:
            return output, maxima
        self.counts.digest_bytes += self.rest_bytes(zone)
        output, share = add_rest(output, call.query, normaliser, rest)
        return output, maxima * (1 - share.unflatten(1, (maxima.shape[1], -1)).mean(2))[..., None]

    def _step_whole(self, whole: Tensor, call: Call, zone: Zone) -> Tensor:
        """A step in which the batch rows `whole` [B] attend to everything, which gives the memory their true rows.

        All keys and values are read for it, so every row counts as one that attended to them.
        """
        query, store, chooser = call.query, call.store, self.chooser
        every = None if call.mask is None else call.mask[:, None]
        attention = StreamedAttention(query[:, :, None], store.length, call.terms, every, store.piece_tokens)
        rows = StreamedRows(query[:, :, None], store.length, call.terms, every, block_size=store.block_size)
        for piece in store.pieces():
            attention.add(*piece)
            rows.add(piece.start, piece.keys)
        output, row = attention.result()[:, :, 0], rows.result(call.heads)
        attended: Tensor | None = None
        if not bool(whole.all()):
            known = chooser.pending is not None and chooser.pending[0].length == store.length
            selection = chooser.pending[1] if known and chooser.pending else chooser.select(call, zone, is_next=False)
            sparse, maxima = self._sparse(selection, call, zone)
            output = torch.where(whole[:, None, None], output, sparse)
            partly, seen = spread(*_for_heads(selection, maxima, call.heads), zone.blocks)
            row = torch.where(whole[:, None, None, None], row, partly)
            attended = whole[:, None, None, None] | seen
        heads = store.heads if self.config.union else call.heads
        everything = torch.arange(zone.blocks, device=query.device).expand(query.shape[0], heads, -1)
        self._count(call, zone, everything)
        chooser.attended, self.seen = (zone, everything), None
        self.memory.push(row, attended)
        self.memory.look(query, call.terms.scale, call.heads)
        chooser.forecast(call)
        return output

    def _push(self, call: Call, zone: Zone, selection: Tensor, maxima: Tensor) -> None:
        """Give the memory this step's row: true every `calibration_interval` steps, else what was attended."""
        if self.interval and self.chooser.steps % self.interval == 0:
            self.counts.calibration_bytes += call.store.key_bytes()
            rows = true_rows(call.query, call.store, call.terms, call.mask, total=False)
            return self.memory.push(rows.result(call.heads))
        self.memory.push_attended(*_for_heads(selection, maxima, call.heads), zone.blocks)

    def _count(self, call: Call, zone: Zone, selection: Tensor) -> None:
        """Count a sparse step."""
        self.chooser.steps += 1
        store, blocks = call.store, selection.shape[2]
        unfilled = zone.blocks * store.block_size - store.length
        read = selection.numel() * store.block_bytes()
        if self.policy.leaves_out or self.config.head_budgets is not None:  # heads differ: their mean
            chosen = int((selection >= 0).sum())
            read, blocks = chosen * store.block_bytes(), round(chosen / (selection.shape[0] * selection.shape[1]))
        self.counts.count_sparse(store.length, blocks * store.block_size - unfilled, blocks, read, store.bytes())
        if self.config.measure_recovery:
            count_recovery(self.counts, true_mass(call.query, store, call.terms, call.mask), selection, blocks)

    # The batch, the length, and files

    def clear(self) -> None:
        """Forget the sequence."""
        self.plan = None
        self.memory.clear()
        self.chooser.clear()
        if self.rest is not None:
            self.rest.clear()

    def state(self) -> State:
        """Return the state of the sequence, without the counters; tensors are its own, not copies."""
        found = self.chooser.state() | {f"memory.{name}": x for name, x in self.memory.state().items()}
        return found if self.rest is None else found | {f"rest.{name}": x for name, x in self.rest.state().items()}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from the `state` of another decoder of the same layer, whose tensors are this one's from now on."""
        self.chooser.restore(state)
        self.memory.restore(inside("memory.", state))
        if self.rest is not None:
            self.rest.restore(inside("rest.", state))

    def crop(self, length: int) -> None:
        """Tokens from `length` on were removed."""
        self.memory.crop(-(-length // self.config.block_size))
        self.chooser.crop(length)

    def select(self, rows: Tensor) -> None:
        """Make the batch `rows` of the old one (beams)."""
        self.plan = None
        self.memory.select(rows)
        self.chooser.select_rows(rows)
        if self.rest is not None:
            self.rest.select(rows)

    def repeat(self, times: int) -> None:
        """Repeat each batch row `times` times."""
        self.plan = None
        self.memory.repeat(times)
        self.chooser.repeat(times)
        if self.rest is not None:
            self.rest.repeat(times)


def _for_heads(selection: Tensor, maxima: Tensor, heads: int) -> tuple[Tensor, Tensor]:
    """Return both [B, heads, K]: after the union of a group, all its query heads remember what the group has seen."""
    several = heads // selection.shape[1]
    if several == 1:
        return selection, maxima
    return selection.repeat_interleave(several, 1), maxima.repeat_interleave(several, 1)
