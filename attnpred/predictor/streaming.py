"""The streaming predictor: a forecast of the next token's attention from a few numbers per block, updated in O(1).

What it remembers of a block (`Stream`):

* its digest, and the estimate that the digest gave for the latest query (`attnpred.predictor.digest`);
* `PEAKS`: the largest logarithm of attention so far, fading by a constant per token, for several rates of fading. A block
  that was attended brings its true value, any other the digest's estimate, so no key is read to calibrate.

The score of a block is a weighted sum of these and of the logarithm of its distance (`StreamingNetwork`): one set of weights
to forecast the next token's attention before its query is known, another to correct the forecast once it is. Weights are
shared by all heads, or each head has its own, if they were trained for the model. Adding and taking maxima is all there
is to it: no exponential, no product of matrices beyond the digest's.
"""

from collections.abc import Sequence
from typing import final

import torch
from torch import Tensor, nn

from attnpred.kernels.digest import FLOOR
from attnpred.predictor.digest import Digest, DigestMap
from attnpred.predictor.memory import Columns, Memory

PEAKS = (0.02, 0.1)
"""By how much the memory of a peak fades per token, in units of the logarithm."""

FEATURES = 2 + len(PEAKS)
"""The estimate, the peaks, and the logarithm of the distance."""


def _fade(peaks: Tensor) -> None:
    for i, rate in enumerate(PEAKS):
        peaks[:, :, i].sub_(rate)


@final
class Stream(Memory):
    """The state of one layer."""

    def __init__(self, block_size: int, digest_map: DigestMap | None, prompt_rows: int) -> None:
        self.rows = prompt_rows
        self.digest = Digest(block_size, digest_map)
        self.peaks = Columns(before=(len(PEAKS),), fill=FLOOR)

    def tables(self) -> Sequence[Columns]:
        return (self.peaks, *self.digest.tables())

    @property
    def sealed(self) -> int:
        return self.digest.sealed

    @property
    def is_empty(self) -> bool:
        return self.digest.estimate.numel() == 0

    def seal(self, keys: Tensor) -> None:
        self.digest.seal(keys)

    def look(self, query: Tensor, scale: float, selecting: int) -> None:
        self.digest.look(query, scale, selecting)

    def push(self, rows: Tensor, attended: Tensor | None = None) -> None:
        columns = rows.shape[3]
        peaks = self.peaks.reserve(rows.shape[0], rows.shape[1], columns, rows.device)
        logs = torch.log(rows.float()).clamp_(min=FLOOR)
        if attended is not None:
            known = self.digest.estimate.shape[-1]
            head = logs[..., :known]
            head.copy_(torch.where(attended[..., :known], head, self.digest.estimate[:, :, None]))
        for row in logs.unbind(2):
            _fade(peaks)
            torch.maximum(peaks, row[:, :, None], out=peaks)

    def push_attended(self, selection: Tensor, maxima: Tensor, blocks: int) -> None:
        """As `push` of the row, but only what was attended is taken the logarithm of."""
        batch, heads, _ = selection.shape
        peaks = self.peaks.reserve(batch, heads, blocks, maxima.device)
        # -1 only comes with left padding, where block 0 is padding too: what is written there is never looked at.
        places = selection.clamp_min(0)[:, :, None].expand(-1, -1, len(PEAKS), -1)
        logs = torch.log(maxima).clamp_(min=FLOOR)[:, :, None]
        _fade(peaks)
        attended = torch.maximum(peaks.gather(3, places), logs)
        estimate = self.digest.estimate
        known = peaks[..., : estimate.shape[-1]]
        torch.maximum(known, estimate[:, :, None], out=known)
        peaks.scatter_(3, places, attended)

    def features(self, first: int, last: int) -> Tensor:
        """Return [B, Hs, last - first, FEATURES], what `score` weighs: for training."""
        estimate, peaks = self.digest.estimate[..., first:last], self.peaks.view()[..., first:last]
        distance = torch.arange(last - first, 0, -1, device=peaks.device, dtype=torch.float32).log2_()
        return torch.stack((estimate, *peaks.unbind(2), distance.expand_as(estimate)), -1)

    def score(self, weights: Tensor, first: int, last: int) -> Tensor:
        """Return [B, Hs, last - first] for blocks `first` to `last`, all of them sealed; weights [Hs or 1, FEATURES]."""
        estimate, peaks = self.digest.estimate[..., first:last], self.peaks.view()[..., first:last]
        score = estimate * weights[:, :1]
        for i in range(len(PEAKS)):
            score.addcmul_(peaks[:, :, i], weights[:, 1 + i : 2 + i])
        distance = torch.arange(last - first, 0, -1, device=score.device, dtype=torch.float32).log2_()
        return score.addcmul_(distance, weights[:, -1:])

    def clear(self) -> None:
        self.peaks.clear()
        self.digest.clear()

    def crop(self, columns: int) -> None:
        self.peaks.crop(columns)
        self.digest.crop(columns)

    def select(self, rows: Tensor) -> None:
        self.peaks.select(rows)
        self.digest.select(rows)

    def repeat(self, times: int) -> None:
        self.peaks.repeat(times)
        self.digest.repeat(times)


@final
class StreamingNetwork(nn.Module):
    """Weights of forecast and correction, [layers, heads, FEATURES], and the digests' projections.

    layers, heads: of the model it was trained for, or 1 and 1 for weights that are shared by all; head_dim: D and rank:
    r of the projections, 0 for none (plain mean keys).
    """

    def __init__(self, layers: int = 1, heads: int = 1, head_dim: int = 0, rank: int = 0) -> None:
        super().__init__()
        start = torch.zeros(layers, heads, FEATURES)
        start[..., 0] = 1.0
        self.correction = nn.Parameter(start.clone())
        start[..., 1 : 1 + len(PEAKS)] = 1.0 / len(PEAKS)
        self.forecast = nn.Parameter(start)
        if rank:
            self.keys = nn.Parameter(torch.zeros(layers, heads, head_dim, rank))
            self.queries = nn.Parameter(torch.zeros(layers, heads, head_dim, rank))
            self.centre = nn.Parameter(torch.zeros(layers, heads, head_dim))
            self.vectors = nn.Parameter(torch.ones(layers, heads))
        self.rank = rank

    def digest_map(self, layer: int) -> DigestMap | None:
        """Return the projections of the model's `layer`-th attention layer, or None for plain mean keys."""
        if not self.rank:
            return None
        vectors = tuple(int(count) for count in self.vectors[layer])
        return DigestMap(self.keys[layer].detach(), self.queries[layer].detach(), self.centre[layer].detach(), vectors)

    def weights(self, layer: int, *, correcting: bool) -> Tensor:
        """Return [heads or 1, FEATURES]."""
        table = self.correction if correcting else self.forecast
        return table[min(layer, table.shape[0] - 1)].detach()
