"""The decode step of one attention layer: select, attend, remember, forecast. Knows nothing of any framework above torch.

    step t:  1. blocks: the forecast made at t-1; a policy that needs the query, or corrects with it, (re)scores them now
             2. the store waits until they are in fast memory, and `sparse_decode` reads them: output and block maxima
             3. the maxima, spread over the columns of all blocks, become the next row of the memory; every
                `calibration_interval` steps the row is the true one, computed from all keys
             4. the policy scores the blocks for a context of one token more; the selection is requested, and waits for t+1

A call of several tokens is dense; its last rows seed the memory, and the forecast follows from there. The attention of a
prompt is computed by others (`observe`); that of a chunk of a prompt, a second turn or the verification of drafted tokens
goes over the pieces of the store (`attend`), and so does a single token that is to attend to everything.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, final

import torch
from torch import Tensor

from attnpred.config import CacheConfig
from attnpred.errors import ConfigError
from attnpred.kernels import sparse_decode
from attnpred.kernels.dense import AttentionTerms
from attnpred.kernels.probe import block_logits
from attnpred.kernels.remaining import QUERIES, attend_blocks
from attnpred.kernels.streamed import StreamedAttention, StreamedRows
from attnpred.policies.base import Policy, View
from attnpred.policies.left import Left
from attnpred.policies.select import Zone, limit_late, select_blocks, without_left_out, zone_at
from attnpred.predictor.memory import Memory, State, inside, spread
from attnpred.shapes import num_blocks
from attnpred.store.base import Store
from attnpred.telemetry import LayerCounts


@final
class LayerDecoder:
    """State and step of one attention layer: memory, pending selection, counters."""

    def __init__(
        self,
        config: CacheConfig,
        policy: Policy[Any],
        counts: LayerCounts,
        layer: int = 0,
        leader: Memory | None = None,
    ) -> None:
        self.config, self.policy, self.counts, self.layer = config, policy, counts, layer
        self.memory: Any = policy.memory(config, layer)
        if leader is not None:
            self.memory.follow(leader)
        self.corrects = policy.needs_query or (policy.corrects and config.late_share != 0)
        wanted = config.calibration_interval
        self.interval = policy.calibration if wanted is None else wanted
        if policy.evicts:
            self.interval = 0  # a true row would need what is gone
            if config.per_query_head:
                raise ConfigError(
                    "got per_query_head with a policy that evicts, expected one selection per kv head: leave it out"
                )
        self.left = Left()
        # A policy that corrects freely has no use for a forecast, but a store that fetches does.
        is_free = policy.corrects and not policy.keeps and config.late_share is None and config.offload is None
        self.forecasts = not policy.needs_query and not is_free
        # Nothing is done to its scores before the best are taken.
        self.chooses = not config.hysteresis
        self.clear()

    def clear(self) -> None:
        """Forget the sequence."""
        self.memory.clear()
        self.pending: tuple[Zone, Tensor] | None = None
        self.attended: tuple[Zone, Tensor] | None = None
        self.first_block: Tensor | None = None
        self.left.clear()
        self.settled: Zone | None = None
        self.known: tuple[Zone | None, Zone] | None = None
        self.steps = 0

    def fits(self, length: int) -> bool:
        """True where the dense path is to be taken because every block may be attended anyway."""
        return self.config.dense_when_fits and self._zone(length).covers_all

    def _zone(self, length: int) -> Zone:
        """Return the zone of a context of `length` tokens; a policy that chose once has one that only grows."""
        settled = self.settled
        if self.known is None or self.known[0] is not settled or self.known[1].length != length:
            zone = zone_at(self.config, length)
            if settled is not None:
                zone = replace(zone, first_recent=settled.first_recent, free=settled.free)
            self.known = settled, zone  # a step asks for it twice
        return self.known[1]

    def observe(
        self,
        query: Tensor,
        store: Store,
        terms: AttentionTerms,
        mask: Tensor | None,
        *,
        prompt: bool,
        keys: Tensor | None = None,
    ) -> None:
        """Take in a dense call: query [B, Hq, Q, D], already in the store; mask [B, Q, L] or None (causal).

        keys [B, Hkv, L, D]: all of them, where they are at hand (a prompt), so that none is read back.
        Rows are computed only when they may be needed: when the context is within H tokens of outgrowing the budget.
        """
        if prompt:
            self.steps = 0
        rows = self._begin(query, store, terms, mask)
        if rows is not None and keys is None:
            for piece in store.pieces():
                rows.add(piece.start, piece.keys)
        elif rows is not None and keys is not None:
            for start in range(0, store.length, store.piece_tokens):
                rows.add(start, keys[:, :, start : start + store.piece_tokens])
        if self.memory.every:
            self._push_every(query, store, terms, mask, keys)
        self._take_in(query, store, terms, rows, keys)

    def attend(
        self, query: Tensor, store: Store, terms: AttentionTerms, mask: Tensor | None, *, remember: bool
    ) -> Tensor:
        """Attend to everything: arguments as in `observe`, which this includes if `remember`. Returns [B, Hq, Q, D]."""
        if self.left.kept is not None:
            return self._attend_left(query, store, terms, mask)
        attention = StreamedAttention(query, store.length, terms, mask, store.piece_tokens)
        rows = self._begin(query, store, terms, mask) if remember else None
        whole = store.whole() if query.shape[2] == 1 else None
        if whole is not None:
            attention.add(*whole)
        for piece in store.pieces() if whole is None or rows is not None else ():
            if whole is None:
                attention.add(*piece)
            if rows is not None:
                rows.add(piece.start, piece.keys)
        if remember:
            if self.memory.every:
                self._push_every(query, store, terms, mask, None)
            self._take_in(query, store, terms, rows, None)
        return attention.result()

    def _begin(self, query: Tensor, store: Store, terms: AttentionTerms, mask: Tensor | None) -> StreamedRows | None:
        """Prepare for a dense call; return what computes its last rows, if any are wanted."""
        self._note_padding(mask)
        self.pending = self.attended = None
        if self.policy.keeps_decoded and (query.shape[2] > 1 or store.length == 1):  # a prompt, or a part of one
            self.settled = zone_at(self.config, store.length)
        recent = min(query.shape[2], self.memory.rows)
        if self.memory.every or not recent or not self._needs_memory(store):
            return None
        shown = None if mask is None else mask[:, -recent:]
        return StreamedRows(query[:, :, -recent:], store.length, terms, shown, block_size=store.block_size)

    def _needs_memory(self, store: Store) -> bool:
        if self.policy.is_dense:
            return False
        return self.memory.every or not self.fits(store.length + self.config.history)

    def _take_in(
        self, query: Tensor, store: Store, terms: AttentionTerms, rows: StreamedRows | None, keys: Tensor | None
    ) -> None:
        if not self._needs_memory(store):
            return
        self._seal(store, keys)
        selecting = self._selecting(query, store)
        if rows is not None:
            self.memory.push(rows.result(selecting))
            if self.memory.watches:
                seen = store.view()[0] if keys is None else keys
                self.memory.watch(rows.query, seen, terms.scale)
        if self.forecasts:
            self.memory.look(query[:, :, -1], terms.scale, selecting)
        self._forecast(query, store)

    def _push_every(
        self, query: Tensor, store: Store, terms: AttentionTerms, mask: Tensor | None, keys: Tensor | None
    ) -> None:
        """Show the memory the rows of all queries of a dense call, some at a time."""
        size, blocks = store.block_size, num_blocks(store.length, store.block_size)
        shown = store.view()[0] if keys is None else keys
        for first in range(0, query.shape[2], QUERIES):
            part = query[:, :, first : first + QUERIES]
            seen = store.length - query.shape[2] + first + part.shape[2]
            allowed = None if mask is None else mask[:, first : first + QUERIES, :seen]
            rows = StreamedRows(part, seen, terms, allowed, block_size=size)
            for start in range(0, seen, store.piece_tokens):
                rows.add(start, shown[:, :, start : min(start + store.piece_tokens, seen)])
            row = rows.result(self._selecting(query, store))
            self.memory.push(torch.nn.functional.pad(row, (0, blocks - row.shape[3])))

    def _attend_left(self, query: Tensor, store: Store, terms: AttentionTerms, mask: Tensor | None) -> Tensor:
        """Attend to all that eviction has left, and go on: `attend` for a policy that evicts."""
        self._begin(query, store, terms, mask)
        queries, blocks = query.shape[2], num_blocks(store.length, store.block_size)
        ids = self.left.blocks(blocks)
        keys, values, slots = store.wait(ids)
        outputs, rows = [], []
        for first in range(0, queries, QUERIES):
            part, position = query[:, :, first : first + QUERIES], store.length - queries + first
            shown = None if mask is None else mask[:, first : first + QUERIES]
            output, maxima = attend_blocks(
                part, keys, values, ids, slots, position, terms, shown, block_size=store.block_size
            )
            outputs.append(output)
            wanted = part.shape[2] if self.memory.every else part.shape[2] - max(0, queries - self.memory.rows - first)
            if self.memory.rows and wanted > 0:
                row = maxima.new_zeros(*maxima.shape[:3], blocks + 1)
                places = ids.masked_fill(ids < 0, blocks)[:, :, None].expand_as(maxima)
                rows.append(row.scatter_(3, places, maxima)[:, :, -wanted:, :blocks])
        for some in rows if self.memory.every else [torch.cat(rows, 2)] if rows else []:
            self.memory.push(some)
        self._take_in(query, store, terms, None, None)
        return torch.cat(outputs, 2)

    def step(self, query: Tensor, store: Store, terms: AttentionTerms, mask: Tensor | None) -> Tensor:
        """Attend with one query per row, [B, Hq, D], whose key is already in the store; mask [B, L] or None.

        Returns [B, Hq, D].
        """
        selecting = self._selecting(query, store)
        zone = self._zone(store.length)
        self._seal(store)
        whole = self.memory.wants_all(query)
        if whole is not None:
            return self._step_whole(whole, query, store, zone, terms, mask)
        again = self._same_blocks(zone)
        if again is not None:
            output, _ = self._attend_to(again, query, store, zone, terms, mask)
            self.pending = None
            if self._chooses_next():
                self.memory.look(query, terms.scale, selecting)
                self._forecast(query, store)
            return output
        is_current = self.corrects or self.pending is None or self.pending[0].length != store.length
        if is_current:
            self.memory.look(query, terms.scale, selecting)
            selection = self._select(query, store, zone, terms, mask)
        else:
            assert self.pending is not None
            selection = self.pending[1]
        output, maxima = self._attend_to(selection, query, store, zone, terms, mask)
        self.counts.digest_bytes += self.memory.look_bytes()
        if not is_current:
            self.memory.look(query, terms.scale, selecting)
        if self.memory.rows:
            self._push(query, store, zone, selection, maxima, terms, mask)
        self.pending = None
        if self._chooses_next():
            self._forecast(query, store)
        return output

    def _chooses_next(self) -> bool:
        # What is not chosen by a policy that evicts is gone, so it chooses at every step.
        return self.policy.evicts or self.steps % self.config.selection_interval == 0

    def _same_blocks(self, zone: Zone) -> Tensor | None:
        """Return the selection of the last step as that of this one; None where a new one is to be made."""
        if self._chooses_next() or self.attended is None:
            return None
        last, selection = self.attended
        if (last.sinks, last.free, last.length + 1) != (zone.sinks, zone.free, zone.length):
            return None
        recent = torch.arange(zone.first_recent, zone.blocks, device=selection.device)
        kept = selection[..., : last.sinks + last.free]
        return torch.cat((kept, recent.expand(*kept.shape[:2], -1)), -1)

    def _attend_to(
        self,
        selection: Tensor,
        query: Tensor,
        store: Store,
        zone: Zone,
        terms: AttentionTerms,
        mask: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """Attend to the blocks of `selection`, and count it: output [B, Hq, D] and block maxima [B, Hs, K]."""
        keys, values, slots = store.wait(selection)
        output, maxima, _ = sparse_decode(
            query,
            keys,
            values,
            selection,
            store.length,
            block_size=store.block_size,
            scale=terms.scale,
            softcap=terms.softcap,
            sinks=terms.sinks,
            mask=mask,
            slots=slots,
        )
        self._count(query, store, zone, selection, terms, mask)
        self.steps += 1
        self.attended = zone, selection
        return output, maxima

    def _step_whole(
        self, whole: Tensor, query: Tensor, store: Store, zone: Zone, terms: AttentionTerms, mask: Tensor | None
    ) -> Tensor:
        """A step in which the batch rows `whole` [B] attend to everything, which gives the memory their true rows.

        All keys and values are read for it, so every row counts as one that attended to them.
        """
        selecting = self._selecting(query, store)
        every = None if mask is None else mask[:, None]
        attention = StreamedAttention(query[:, :, None], store.length, terms, every, store.piece_tokens)
        rows = StreamedRows(query[:, :, None], store.length, terms, every, block_size=store.block_size)
        for piece in store.pieces():
            attention.add(*piece)
            rows.add(piece.start, piece.keys)
        output, row = attention.result()[:, :, 0], rows.result(selecting)
        attended: Tensor | None = None
        if not bool(whole.all()):
            known = self.pending is not None and self.pending[0].length == store.length
            selection = self.pending[1] if known and self.pending else self._select(query, store, zone, terms, mask)
            keys, values, slots = store.wait(selection)
            sparse, maxima, _ = sparse_decode(
                query, keys, values, selection, store.length, block_size=store.block_size, scale=terms.scale,
                softcap=terms.softcap, sinks=terms.sinks, mask=mask, slots=slots,
            )  # fmt: skip
            output = torch.where(whole[:, None, None], output, sparse)
            partly, seen = spread(selection, maxima, zone.blocks)
            row = torch.where(whole[:, None, None, None], row, partly)
            attended = whole[:, None, None, None] | seen
        everything = torch.arange(zone.blocks, device=query.device).expand(query.shape[0], selecting, -1)
        self._count(query, store, zone, everything, terms, mask)
        self.steps += 1
        self.attended = zone, everything
        self.memory.push(row, attended)
        self.memory.look(query, terms.scale, selecting)
        self.pending = None
        self._forecast(query, store)
        return output

    def _seal(self, store: Store, keys: Tensor | None = None) -> None:
        """Show the memory the keys of blocks that have become full: of all `keys`, if they are at hand."""
        size, sealed, full = store.block_size, self.memory.sealed, store.length // store.block_size
        if 0 <= sealed < full:
            new = store.keys_of(sealed, full) if keys is None else keys[:, :, sealed * size : full * size]
            self.memory.seal(new)

    def _push(
        self,
        query: Tensor,
        store: Store,
        zone: Zone,
        selection: Tensor,
        maxima: Tensor,
        terms: AttentionTerms,
        mask: Tensor | None,
    ) -> None:
        """Give the memory this step's row: true every `calibration_interval` steps, else what was attended."""
        interval = self.interval
        if interval and self.steps % interval == 0:
            self.counts.calibration_bytes += store.key_bytes()
            return self.memory.push(self._true_rows(query, store, terms, mask, total=False).result(selection.shape[1]))
        self.memory.push_attended(selection, maxima, zone.blocks)

    def _forecast(self, query: Tensor, store: Store) -> None:
        """Choose the blocks of the next token, from the past alone."""
        self.pending = None
        if not self.forecasts:
            return
        zone = self._zone(store.length + 1)
        if not (self.config.dense_when_fits and zone.covers_all):
            self.pending = zone, self._select(query, store, zone, None, None)
            store.request(self.pending[1])
            if self.policy.evicts:
                self.left.keep(self.pending[1], num_blocks(store.length, store.block_size))
                store.release(self.pending[1])

    def _select(
        self, query: Tensor, store: Store, zone: Zone, terms: AttentionTerms | None, mask: Tensor | None
    ) -> Tensor:
        """Return the selection for `zone`: of the present step if `terms` are given, else of the next."""

        def block_mass() -> Tensor:
            assert terms is not None
            self.counts.calibration_bytes += store.key_bytes()
            mass = self._true_mass(query, store, terms, mask)
            return mass.unflatten(1, (self._selecting(query, store), -1)).sum(2)

        def logits_of(blocks: Tensor) -> Tensor:
            assert terms is not None
            self.counts.calibration_bytes += blocks.numel() * store.block_size * query.shape[2] * query.element_size()
            keys, _, slots = store.wait(blocks)
            return block_logits(
                query, keys, blocks, store.length, block_size=store.block_size, scale=terms.scale,
                softcap=terms.softcap, mask=mask, slots=slots,
            )  # fmt: skip

        if self.memory.is_empty:
            scores = torch.zeros(1, 1, zone.blocks, device=query.device)
        else:
            view = View(self.memory, zone, self.layer, terms is not None, block_mass, logits_of)
            is_limited = terms is not None and self.pending is not None and self.config.late_share is not None
            if self.chooses and self.first_block is None and not is_limited:
                selection = self.policy.choose(view)
                if selection is not None:
                    return selection
            scores = self.policy.score(view)
        scores = scores.to(query.device).expand(query.shape[0], self._selecting(query, store), -1)
        scores = self.left.limit(scores)
        if self.config.hysteresis and self.attended is not None:
            last = self.attended[1].clamp_min(0)
            scores = scores.scatter_add(2, last, torch.full_like(last, self.config.hysteresis, dtype=scores.dtype))
        if terms is not None and self.pending is not None and self.config.late_share is not None:
            forecast = self.pending[1][..., zone.sinks : zone.sinks + zone.free]
            size = self.pending[1].shape[2]
            late = int(self.config.late_share * size + 1e-6)
            scores = limit_late(scores, zone, forecast, late, self.first_block)
            selection = select_blocks(scores, zone, self.first_block)
            self.counts.count_late(selection[..., zone.sinks : zone.sinks + zone.free], forecast, size)
            return selection
        selection = self.left.strike(select_blocks(scores, zone, self.first_block))
        return without_left_out(selection, scores, zone) if self.policy.leaves_out else selection

    def _true_mass(self, query: Tensor, store: Store, terms: AttentionTerms, mask: Tensor | None) -> Tensor:
        """Return the probability mass that `query` puts on each block, [B, Hq, N]."""
        return self._true_rows(query, store, terms, mask, total=True).result()[:, :, 0]

    def _true_rows(
        self, query: Tensor, store: Store, terms: AttentionTerms, mask: Tensor | None, *, total: bool
    ) -> StreamedRows:
        every = None if mask is None else mask[:, None]
        rows = StreamedRows(query[:, :, None], store.length, terms, every, block_size=store.block_size, total=total)
        for piece in store.pieces():
            rows.add(piece.start, piece.keys)
        return rows

    def _count(
        self, query: Tensor, store: Store, zone: Zone, selection: Tensor, terms: AttentionTerms, mask: Tensor | None
    ) -> None:
        blocks = selection.shape[2]
        unfilled = zone.blocks * store.block_size - store.length
        read = selection.numel() * store.block_bytes()
        if self.policy.leaves_out:  # heads differ: their mean
            chosen = int((selection >= 0).sum())
            read, blocks = chosen * store.block_bytes(), round(chosen / (selection.shape[0] * selection.shape[1]))
        self.counts.count_sparse(store.length, blocks * store.block_size - unfilled, blocks, read, store.bytes())
        if self.config.measure_recovery:
            mass = self._true_mass(query, store, terms, mask)
            grouped = mass.unflatten(1, (selection.shape[1], -1))
            inside = selection.clamp_min(0)[:, :, None].expand(-1, -1, grouped.shape[2], -1)
            kept = (grouped.gather(3, inside) * (selection >= 0)[:, :, None]).sum(3)
            top = grouped.sum(2).topk(min(blocks, zone.blocks), -1).indices
            best = grouped.gather(3, top[:, :, None].expand(-1, -1, grouped.shape[2], -1)).sum(3)
            self.counts.count_recovery(kept, best)

    def _selecting(self, query: Tensor, store: Store) -> int:
        return query.shape[1] if self.config.per_query_head else store.heads

    def _note_padding(self, mask: Tensor | None) -> None:
        """Remember in which block each row begins, if rows are padded on the left."""
        if mask is not None:
            self.first_block = mask[:, -1].int().argmax(-1) // self.config.block_size

    def state(self) -> State:
        """Return the state of the sequence, without the counters; tensors are its own, not copies."""
        found: State = {"steps": self.steps} | {f"memory.{name}": x for name, x in self.memory.state().items()}
        if self.first_block is not None:
            found["first_block"] = self.first_block
        found |= {f"left.{name}": x for name, x in self.left.state().items()}
        if self.settled is not None:
            found["settled"] = self.settled.length
        for name, chosen in (("pending", self.pending), ("attended", self.attended)):
            if chosen is not None:
                found |= {f"{name}.length": chosen[0].length, f"{name}.blocks": chosen[1]}
        return found

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from the `state` of another decoder of the same layer, whose tensors are this one's from now on."""
        self.clear()
        self.memory.restore(inside("memory.", state))
        self.steps, self.first_block = state["steps"], state.get("first_block")
        self.left.restore(inside("left.", state))
        self.settled = zone_at(self.config, state["settled"]) if "settled" in state else None
        self.pending, self.attended = (
            (self._zone(state[f"{name}.length"]), state[f"{name}.blocks"]) if f"{name}.blocks" in state else None
            for name in ("pending", "attended")
        )

    def crop(self, length: int) -> None:
        """Tokens from `length` on were removed."""
        self.memory.crop(-(-length // self.config.block_size))
        self.left.crop(-(-length // self.config.block_size))
        if self.settled is not None and length < self.settled.length:
            self.settled = None
        self.pending = self.attended = None

    def select(self, rows: Tensor) -> None:
        """Make the batch `rows` of the old one (beams)."""
        self.memory.select(rows)
        self.left.select(rows)
        if self.first_block is not None:
            self.first_block = self.first_block[rows.to(self.first_block.device)]
        self._map_selections(lambda selection: selection[rows.to(selection.device)])

    def repeat(self, times: int) -> None:
        """Repeat each batch row `times` times."""
        self.memory.repeat(times)
        self.left.repeat(times)
        if self.first_block is not None:
            self.first_block = self.first_block.repeat_interleave(times, 0)
        self._map_selections(lambda selection: selection.repeat_interleave(times, 0))

    def _map_selections(self, change: Callable[[Tensor], Tensor]) -> None:
        if self.pending is not None:
            self.pending = self.pending[0], change(self.pending[1])
        if self.attended is not None:
            self.attended = self.attended[0], change(self.attended[1])
