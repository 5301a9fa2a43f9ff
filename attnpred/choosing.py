"""`Chooser`: which blocks a layer attends to, at this step and at the next one. The part of the decode step that decides.

It asks the policy for scores, and adds what is common to all policies: sinks and recent window, the budget, what eviction
has left, hysteresis, the limit on late blocks, left padding. The forecast of the next step waits in `pending`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, final

import torch
from torch import Tensor

from attnpred.checks import whole
from attnpred.config import CacheConfig
from attnpred.errors import CacheFileError
from attnpred.kernels.dense import AttentionTerms
from attnpred.kernels.probe import block_logits
from attnpred.policies.base import Policy, View
from attnpred.policies.budgets import counts_for, select_ragged, union_scores
from attnpred.policies.left import Left
from attnpred.policies.select import Zone, limit_late, select_blocks, without_left_out, zone_at
from attnpred.predictor.memory import State, inside
from attnpred.shapes import num_blocks
from attnpred.store.base import Store
from attnpred.telemetry import LayerCounts
from attnpred.truth import true_mass


@dataclass(frozen=True, slots=True)
class Call:
    """What a layer is called with: query [B, Hq, D] or [B, Hq, Q, D], whose keys are in the store.

    mask: [B, L] or [B, Q, L], True where attended, or None (causal). heads: Hs, how many select.
    """

    query: Tensor
    store: Store
    terms: AttentionTerms
    mask: Tensor | None
    heads: int


@final
class Chooser:
    """Zone, pending selection, what was attended last, what is left: of one layer and one sequence."""

    def __init__(self, config: CacheConfig, policy: Policy[Any], counts: LayerCounts, layer: int, memory: Any) -> None:
        self.config, self.policy, self.counts, self.layer, self.memory = config, policy, counts, layer, memory
        self.corrects = policy.needs_query or (policy.corrects and config.late_share != 0)
        # A policy that corrects freely has no use for a forecast, but a store that fetches does.
        is_free = policy.corrects and not policy.keeps and config.late_share is None and config.offload is None
        self.forecasts = not policy.needs_query and not is_free
        # Nothing is done to its scores before the best are taken.
        self.is_plain = not (config.hysteresis or config.union or config.head_budgets)
        self.left = Left()
        self.clear()

    def clear(self) -> None:
        """Forget the sequence."""
        self.pending: tuple[Zone, Tensor] | None = None
        self.attended: tuple[Zone, Tensor] | None = None
        self.first_block: Tensor | None = None
        self.left.clear()
        self.settled: Zone | None = None
        self.known: tuple[Zone | None, Zone] | None = None
        self.steps = 0

    def zone(self, length: int) -> Zone:
        """Return the zone of a context of `length` tokens; a policy that chose once has one that only grows."""
        settled = self.settled
        if self.known is None or self.known[0] is not settled or self.known[1].length != length:
            zone = zone_at(self.config, length)
            if settled is not None:
                zone = replace(zone, sinks=settled.sinks, first_recent=settled.first_recent, free=settled.free)
            self.known = settled, zone  # a step asks for it twice
        return self.known[1]

    def fits(self, length: int) -> bool:
        """True where the dense path is to be taken because every block may be attended anyway."""
        return self.config.dense_when_fits and self.zone(length).covers_all

    def begin(self, store: Store, queries: int, mask: Tensor | None) -> None:
        """A dense call of so many tokens: what was chosen before it counts no more."""
        if mask is not None:  # rows are padded on the left: remember in which block each begins
            first = mask[:, -1].int().argmax(-1) // self.config.block_size
            # One mask may serve all rows, until beams make them differ; that of a chunk of a prompt pads nothing.
            self.first_block = first.expand(store.batch) if bool(first.any()) else None
        self.pending = self.attended = None
        if self.policy.keeps_decoded and (queries > 1 or store.length == 1):  # a prompt, or a part of one
            self.settled = zone_at(self.config, store.length)

    def is_due(self) -> bool:
        """True where the blocks of this step, or of the next one, are to be chosen anew."""
        # What is not chosen by a policy that evicts is gone, so it chooses at every step.
        return self.policy.evicts or self.steps % self.config.selection_interval == 0

    def same_blocks(self, zone: Zone) -> Tensor | None:
        """Return the selection of the last step as that of this one; None where a new one is to be made."""
        if self.is_due() or self.attended is None:
            return None
        last, selection = self.attended
        if (last.sinks, last.free, last.length + 1) != (zone.sinks, zone.free, zone.length):
            return None
        recent = torch.arange(zone.first_recent, zone.blocks, device=selection.device)
        kept = selection[..., : selection.shape[2] - (last.blocks - last.first_recent)]
        return torch.cat((kept, recent.expand(*kept.shape[:2], -1)), -1)

    def forecast(self, call: Call) -> None:
        """Choose the blocks of the next token, from the past alone, and request them."""
        self.pending = None
        if not self.forecasts:
            return
        store = call.store
        zone = self.zone(store.length + 1)
        if not (self.config.dense_when_fits and zone.covers_all):
            self.pending = zone, self.select(call, zone, is_next=True)
            store.request(self.pending[1])
            if self.policy.evicts:
                self.left.keep(self.pending[1], num_blocks(store.length, store.block_size))
                store.release(self.pending[1])

    def select(self, call: Call, zone: Zone, *, is_next: bool) -> Tensor:
        """Return the selection [B, Hs, K] for `zone`: of the present step, or of the next one."""
        forecast = None if is_next or self.config.late_share is None else self.pending
        if self.memory.is_empty:
            scores = torch.zeros(1, 1, zone.blocks, device=call.query.device, dtype=torch.float32)
        else:
            view = self._view(call, zone, is_next)
            if self.is_plain and self.first_block is None and forecast is None:
                selection = self.policy.choose(view)
                if selection is not None:
                    return selection
            scores = self.policy.score(view)
        scores = scores.to(call.query.device).expand(call.query.shape[0], call.heads, -1)
        if self.config.union:
            scores = union_scores(scores, call.store.heads)
        scores = self.left.limit(scores)
        if self.config.hysteresis and self.attended is not None:
            last = self.attended[1].clamp_min(0)
            scores = scores.scatter_add(2, last, torch.full_like(last, self.config.hysteresis, dtype=scores.dtype))
        if forecast is not None:
            return self._corrected(scores, zone, forecast[1])
        if self.config.head_budgets is None:
            selection = select_blocks(scores, zone, self.first_block)
        else:
            counts = counts_for(self.config.head_budgets, scores, zone)
            selection = select_ragged(scores, zone, counts, self.first_block)
        selection = self.left.strike(selection)
        return without_left_out(selection, scores, zone) if self.policy.leaves_out else selection

    def _view(self, call: Call, zone: Zone, is_next: bool) -> View[Any]:
        query, store = call.query, call.store

        def mass() -> Tensor:
            self.counts.calibration_bytes += store.key_bytes()
            return true_mass(query, store, call.terms, call.mask).unflatten(1, (call.heads, -1)).sum(2)

        def logits(blocks: Tensor) -> Tensor:
            self.counts.calibration_bytes += blocks.numel() * store.block_size * query.shape[2] * query.element_size()
            keys, _, slots = store.wait(blocks)
            return block_logits(
                query, keys, blocks, store.length, block_size=store.block_size, scale=call.terms.scale,
                softcap=call.terms.softcap, mask=call.mask, slots=slots,
            )  # fmt: skip

        if is_next:
            return View(self.memory, zone, self.layer, first_block=self.first_block)
        return View(self.memory, zone, self.layer, True, mass, logits, self.first_block)

    def _corrected(self, scores: Tensor, zone: Zone, forecast: Tensor) -> Tensor:
        """Choose by scores of the present step, with few blocks outside of `forecast` [B, Hs, K], which come late."""
        assert self.config.late_share is not None
        size, wanted = forecast.shape[2], forecast[..., zone.sinks : zone.sinks + zone.free]
        late = int(self.config.late_share * size + 1e-6)
        selection = select_blocks(limit_late(scores, zone, wanted, late, self.first_block), zone, self.first_block)
        self.counts.count_late(selection[..., zone.sinks : zone.sinks + zone.free], wanted, size)
        return selection

    # The batch, the length, and files

    def state(self) -> State:
        """Return the state of the sequence; tensors are its own, not copies."""
        found: State = {"steps": self.steps}
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
        """Go on from the `state` of another, whose tensors are this one's from now on."""
        self.clear()
        self.steps, self.first_block = whole("steps", state["steps"], error=CacheFileError), state.get("first_block")
        self.left.restore(inside("left.", state))
        self.settled = zone_at(self.config, state["settled"]) if "settled" in state else None
        self.pending, self.attended = (
            (self.zone(state[f"{name}.length"]), state[f"{name}.blocks"]) if f"{name}.blocks" in state else None
            for name in ("pending", "attended")
        )

    def crop(self, length: int) -> None:
        """Tokens from `length` on were removed."""
        self.left.crop(num_blocks(length, self.config.block_size))
        if self.settled is not None and length < self.settled.length:
            self.settled = None
        self.pending = self.attended = None

    def select_rows(self, rows: Tensor) -> None:
        """Make the batch `rows` of the old one (beams)."""
        self.left.select(rows)
        if self.first_block is not None:
            self.first_block = self.first_block[rows.to(self.first_block.device)]
        self._map_selections(lambda selection: selection[rows.to(selection.device)])

    def repeat(self, times: int) -> None:
        """Repeat each batch row `times` times."""
        self.left.repeat(times)
        if self.first_block is not None:
            self.first_block = self.first_block.repeat_interleave(times, 0)
        self._map_selections(lambda selection: selection.repeat_interleave(times, 0))

    def _map_selections(self, change: Callable[[Tensor], Tensor]) -> None:
        if self.pending is not None:
            self.pending = self.pending[0], change(self.pending[1])
        if self.attended is not None:
            self.attended = self.attended[0], change(self.attended[1])
