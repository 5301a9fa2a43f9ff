"""The fitted memory: what it forecasts by is found while the prompt is read, for every head of every layer on its own.

What it remembers of a block:

* its digest, and the estimate that the digest gave for the latest query (`attnpred.predictor.digest`);
* its past: the logarithm of a slow exponential average (`RATE`) of the attention on it.

The score of a block is a weighted sum of both, of the logarithm of its distance, and of one: a forecast of the logarithm of
its attention. The weights come from the prompt's own last rows, which are true and cost nothing more: ridge regression
(`attnpred.predictor.ridge`), where a block counts by the root of its attention. There are two sets: one to forecast the next
token's attention before its query is known, by the estimate of the query before, and one to correct the forecast.

A block that was attended brings its true value into the average. Any other brings its own score, as the best guess at what
was not read; without that it would look as if it had died. No key is read to calibrate.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, final

import torch
from torch import Tensor

from attnpred import kernels
from attnpred.kernels.digest import FLOOR
from attnpred.predictor.digest import Asked, Digest
from attnpred.predictor.memory import Columns, Memory
from attnpred.predictor.ridge import Ridge
from attnpred.predictor.told import mixing, told_by

RATE = 0.03
"""What a new row weighs in the average; 0.02 to 0.05 are alike, 0.15 is worse (docs/LOG.md, 2026-11-28)."""
WARM = 32
"""The first rows of a sequence only fill the average; a fit on 32 rows is as good as one on 64 (docs/LOG.md, 2026-11-28)."""
PRIOR = {True: (0.70, 0.40, 0.10, -0.46), False: (0.30, 0.61, 0.04, -0.80)}
"""Weights of estimate, average, distance and one where nothing is known: of the correction (True) and of the forecast. They
are what heads of several models find, in the median (`python -m tools.fitted_prior`)."""


@final
class Fitted(Memory):
    """The state of one layer; `edges` are the sink and recent blocks, which are attended anyway."""

    remembers: ClassVar[tuple[str, ...]] = ("seen",)

    def __init__(self, block_size: int, edges: tuple[int, int], prompt_rows: int) -> None:
        self.rows, self.edges = prompt_rows, edges
        self.digest = Digest(block_size)
        self.ridges = {False: Ridge(), True: Ridge()}  # of the forecast and of the correction
        self.past = Columns(before=(1,), fill=FLOOR)
        self.distances = torch.empty(0, dtype=torch.float32, device="cpu")
        self.clear()

    def clear(self) -> None:
        super().clear()
        self.seen = 0
        self._weights: dict[bool, Tensor] = {}
        self.met: tuple[Tensor, float] | None = None

    def tables(self) -> Sequence[Columns]:
        return (self.past,)

    def parts(self) -> Mapping[str, Memory]:
        return {"digest": self.digest, "forecast": self.ridges[False], "correction": self.ridges[True]}

    @property
    def sealed(self) -> int:
        return self.digest.sealed

    @property
    def is_empty(self) -> bool:
        return self.digest.is_empty

    def look_bytes(self) -> int:
        return self.digest.look_bytes()

    def restore(self, state: Mapping[str, Any]) -> None:
        super().restore(state)
        self._weights.clear()

    def select(self, rows: Tensor) -> None:
        super().select(rows)
        self._weights.clear()
        self.met = None

    def repeat(self, times: int) -> None:
        super().repeat(times)
        self._weights.clear()
        self.met = None

    def meet(self, query: Tensor, scale: float) -> None:
        self.met = query.detach(), scale
        self.digest.meet(query, scale)

    def wants_means(self, queries: int) -> bool:
        return self.digest.wants_means(queries)

    def renew(self, means: Tensor) -> None:
        self.digest.renew(means)

    def seal(self, keys: Tensor) -> None:
        self.digest.seal(keys)

    def look(self, query: Tensor, scale: float, selecting: int) -> None:
        self.digest.look(query, scale, selecting)

    def push(self, rows: Tensor, attended: Tensor | None = None) -> None:
        batch, heads, count, columns = rows.shape
        past = self.past.reserve(batch, heads, columns, rows.device)[:, :, 0]
        met, self.met = self.met, None
        if met is not None and attended is None and met[0].shape[2] == count:
            self._fit(rows, past, *met)
            return
        for i in range(count):
            row = rows[:, :, i].log().clamp_min(FLOOR)
            if attended is not None:
                row = torch.where(attended[:, :, i], row, self._guess(columns))
            past.copy_(_averaged(past, row))
        self.seen += count

    def push_attended(self, selection: Tensor, maxima: Tensor, blocks: int) -> None:
        """As `push` of the row, but only what was attended is taken the logarithm of."""
        batch, heads, _ = selection.shape
        self.past.reserve(batch, heads, blocks, maxima.device)
        weights, estimate = self.weights(True), self.digest.estimate
        distance = self._distance(estimate.shape[2], 0, estimate.shape[2])
        kernels.remember(self.past.data, RATE, blocks, estimate, weights, distance, selection, maxima)

    def tables_for(self, blocks: int) -> tuple[Tensor, ...]:
        """Have room for `blocks` blocks, all of them sealed, and return what compiled steps read and write.

        Past, codes, maps and centre of the digests, weights and distances: the very same tensors, as long as they lie there.
        """
        past, digest = self.past, self.digest
        if blocks > past.data.shape[3]:
            past.reserve(past.data.shape[0], past.data.shape[1], blocks, past.data.device)
        if blocks > self.distances.numel():
            self._distance(blocks, 0, 0)
        return past.data, digest.codes_for(blocks), digest.to_keys, digest.centre, self.weights(True), self.distances

    def took(self, asked: Asked, blocks: int) -> None:
        """Note that a compiled step chose for `asked`, and remembered `blocks` blocks."""
        self.past.count = max(self.past.count, blocks)
        self.digest.took(asked)

    def _guess(self, columns: int) -> Tensor:
        """Return the scores [B, Hs, columns] of this step by the correction, the floor where there is no digest yet."""
        known = min(self.digest.estimate.shape[2], columns)
        found = self.score(self.weights(True), 0, known, columns)
        found[..., :known] += self.weights(True)[..., -1:]
        found[..., known:] = FLOOR
        return found.clamp_(FLOOR, 0.0)

    def weights(self, correcting: bool) -> Tensor:
        """Return the weights [B, Hs, 4] of the correction or of the forecast, solved once for what was seen."""
        found = self._weights.get(correcting)
        if found is None:
            prior = torch.tensor(PRIOR[correcting], dtype=torch.float32, device=self.past.data.device)
            ridge, (batch, heads) = self.ridges[correcting], self.past.data.shape[:2]
            solved = ridge.solve(prior) if ridge.sums.numel() else prior.expand(batch, heads, -1)
            found = self._weights[correcting] = solved.contiguous()
        return found

    def choose(self, correcting: bool, sinks: int, first_recent: int, blocks: int, free: int) -> Tensor:
        """Return `kernels.choose` of what `score` gives, in one call where the estimate is still to be computed."""
        weights = self.weights(correcting)
        taken = self.digest.take_asked() if sinks < first_recent else None
        if taken is None:
            return kernels.choose(self.score(weights, sinks, first_recent, blocks), sinks, first_recent, blocks, free)
        from attnpred.kernels import numba_digest  # numba is loaded when it is used, not before

        asked, prepared = taken
        distance = self._distance(asked.blocks, sinks, first_recent)
        self.digest.estimate, selection = numba_digest.choose(
            asked.query, prepared, asked.blocks, asked.selecting, self.past.data, weights, distance,
            sinks, first_recent, blocks, free,
        )  # fmt: skip
        return selection

    def score(self, weights: Tensor, first: int, last: int, blocks: int) -> Tensor:
        """Return [B, Hs, blocks]: scores of blocks `first` to `last`, all of them sealed, but for the weight of one."""
        estimate = self.digest.estimate
        if first == last:  # there may be fewer sealed blocks than sinks
            return self.past.data.new_zeros(*estimate.shape[:2], blocks)
        distance = self._distance(estimate.shape[2], first, last)
        return kernels.weigh(estimate, self.past.data, weights, distance, first, last, blocks)

    def _distance(self, sealed: int, first: int, last: int) -> Tensor:
        """Return [last - first]: the logarithms of how far blocks `first` to `last` lie before the end of `sealed`."""
        if sealed > self.distances.numel():
            size = sealed * 5 // 4 + 16
            self.distances = torch.arange(size, 0, -1, device=self.past.data.device, dtype=torch.float32).log2_()
        start = self.distances.numel() - sealed
        return self.distances[start + first : start + last]

    def _fit(self, rows: Tensor, past: Tensor, query: Tensor, scale: float) -> None:
        """Learn from true rows [B, Hs, R, N] of queries [B, Hq, R, D], the latest; their keys are sealed already."""
        count, size = rows.shape[2], self.digest.block_size
        first, last = self.edges[0], self.digest.sealed - count // size - self.edges[1] - 1
        mix = mixing(count, self.seen, RATE, rows.device)
        before = torch.cat((past.exp()[:, :, None], rows.float()), 2) if self.seen else rows.float()
        warm = max(0, min(count, WARM - self.seen))
        self.seen += count
        if last > first:
            averages = mix[:-1, -before.shape[2] :] @ before[..., first:last]
            for told in told_by(rows, averages, query, scale, self.digest, first, last, warm):
                self.ridges[told.correcting].add(told.features, told.values, told.weights)
        past.copy_((mix[-1:, -before.shape[2] :] @ before)[:, :, 0].log_().clamp_(min=FLOOR))
        self._weights.clear()


def _averaged(past: Tensor, row: Tensor) -> Tensor:
    """Return the logarithm of the average after one more row, both given by their logarithms."""
    return torch.logaddexp(past + _KEEP, row + _GAIN).clamp_(min=FLOOR)


_KEEP, _GAIN = math.log(1 - RATE), math.log(RATE)
