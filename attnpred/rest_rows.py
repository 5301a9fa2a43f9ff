"""Learn what steps leave out (`attnpred.predictor.rest`) from the last rows of a dense call, decoded once more.

The full output of these rows is there anyway, and so is the log-sum-exp over everything, by which a memory's rows are made.
What a step would have attended to is not: the policy chooses for some of them as it would for a step, and `sparse_decode`
attends to that. So a prompt costs `ROWS` decode steps of the layer more, whatever the policy.

A call of fewer tokens than that teaches nothing. They are spread over the last `CacheConfig.history` rows.
"""

from typing import Any, final

import torch
from torch import Tensor

from attnpred.choosing import Call, Chooser
from attnpred.kernels import sparse_decode
from attnpred.policies.select import zone_at
from attnpred.predictor.rest import Known, Rest

ROWS = 16
"""How many rows are decoded once more, all where the history has fewer."""


def attend_selected(selection: Tensor, call: Call, length: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return what `sparse_decode` does, for the blocks `selection` [B, Hs, K] of the first `length` tokens."""
    store, terms = call.store, call.terms
    keys, values, slots = store.wait(selection)
    return sparse_decode(
        call.query, keys, values, selection, length, block_size=store.block_size, scale=terms.scale, softcap=terms.softcap,
        sinks=terms.sinks, mask=call.mask, slots=slots,
    )  # fmt: skip


@final
class MeanKey:
    """The mean of the keys that the last query of a call may attend to, fed in pieces."""

    def __init__(self, call: Call) -> None:
        self.call = call
        self.total: Tensor | None = None
        self.count = torch.zeros(1, 1, 1, dtype=torch.float32, device=call.query.device)

    def add(self, start: int, keys: Tensor) -> None:
        """Take in the keys [B, Hkv, T, D] of the tokens from `start` on."""
        if self.call.mask is None:
            total, count = keys.sum(2, dtype=torch.float32), self.count + keys.shape[2]
        else:
            shown = self.call.mask[:, -1, start : start + keys.shape[2]].float()
            total = (shown[:, None, None] @ keys.float())[:, :, 0]
            count = self.count + shown.sum(-1)[:, None, None]
        self.total, self.count = total if self.total is None else self.total + total, count

    def scaled(self) -> Tensor:
        """Return [B, Hkv, D], times the scale of the logits."""
        assert self.total is not None
        return self.total / self.count.clamp_min(1) * self.call.terms.scale


@final
class RestRows:
    """Beside the dense calls of one layer."""

    def __init__(self, rest: Rest, chooser: Chooser, memory: Any) -> None:
        self.rest, self.chooser, self.memory = rest, chooser, memory

    @property
    def _rows(self) -> int:
        return min(ROWS, self.chooser.config.history)

    def wants(self, call: Call) -> bool:
        """True where a call has enough tokens to learn from."""
        return call.query.shape[2] >= self._rows

    def learn(self, call: Call, output: Tensor, normaliser: Tensor, mean_key: Tensor) -> None:
        """Learn from a dense call of Q tokens: output [B, Hq, R, Dv] and log-sum-exp [B, Hq, R] of its last R."""
        rows, history = self._rows, self.chooser.config.history
        step = min(output.shape[2], normaliser.shape[2], history) // rows
        backs = [back for back in range((rows - 1) * step, -1, -step) if self._is_partial(call, back)] if step else []
        if not backs:
            return
        if call.terms.sinks is not None:
            normaliser = torch.logaddexp(normaliser, call.terms.sinks.float().view(1, -1, 1))
        owns, normalisers = (
            torch.stack(column, 2) for column in zip(*(self._decoded(call, back) for back in backs), strict=True)
        )
        places = [-1 - back for back in backs]
        full = normaliser[:, :, places]
        counts = (full.amax(1) > -torch.inf).float()
        query, output = call.query[:, :, places], output[:, :, places]
        self.rest.learn(Known(query, output, full, owns, normalisers, mean_key, counts))

    def _is_partial(self, call: Call, back: int) -> bool:
        """True where a step at the token `back` before the last would leave something out."""
        return not zone_at(self.chooser.config, call.store.length - back).covers_all

    def _decoded(self, call: Call, back: int) -> tuple[Tensor, Tensor]:
        """Return output [B, Hq, Dv] and log-sum-exp [B, Hq] of what a step would attend to there."""
        chooser, queries, length = self.chooser, call.query.shape[2], call.store.length - back
        place, is_next = queries - 1 - back, not chooser.corrects
        known = max(0, place - is_next)  # the query that a forecast knows is the one before
        self.memory.look(call.query[:, :, known], call.terms.scale, call.heads)
        mask = self._shown(call, place, length)
        one = Call(call.query[:, :, place], call.store, call.terms, mask, call.heads)
        selection = chooser.select(one, zone_at(chooser.config, length), is_next=is_next)
        own, _, normaliser = attend_selected(selection, one, length)
        return own, normaliser

    @staticmethod
    def _shown(call: Call, place: int, length: int) -> Tensor:
        """Return which tokens the query at `place` may attend to, [B or 1, L]; some policies look at all keys."""
        shown = torch.arange(call.store.length, device=call.query.device) < length
        return shown[None] if call.mask is None else call.mask[:, place] & shown
