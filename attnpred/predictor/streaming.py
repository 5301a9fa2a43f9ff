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

from collections.abc import Mapping, Sequence
from typing import final

import torch
from torch import Tensor, nn

from attnpred import kernels
from attnpred.kernels.digest import FLOOR
from attnpred.predictor.digest import Digest, DigestMap
from attnpred.predictor.memory import Columns, Memory

PEAKS = (0.02, 0.1)
"""By how much the memory of a peak fades per token, in units of the logarithm."""

FEATURES = 2 + len(PEAKS)
"""The estimate, the peaks, and the logarithm of the distance."""

_RATES = torch.tensor(PEAKS, dtype=torch.float32, device="cpu")


@final
class Stream(Memory):
    """The state of one layer."""

    def __init__(self, block_size: int, digest_map: DigestMap | None, prompt_rows: int) -> None:
        self.rows = prompt_rows
        self.weights: dict[bool, Tensor] = {}
        """Of forecast (False) and correction (True), as whoever scores has prepared them."""
        self.digest = Digest(block_size, digest_map)
        self.peaks = Columns(before=(len(PEAKS),), fill=FLOOR)
        self.distances = torch.empty(0, dtype=torch.float32, device="cpu")

    def tables(self) -> Sequence[Columns]:
        return (self.peaks,)

    def parts(self) -> Mapping[str, Memory]:
        return {"digest": self.digest}

    @property
    def sealed(self) -> int:
        return self.digest.sealed

    @property
    def is_empty(self) -> bool:
        return self.digest.is_empty

    def look_bytes(self) -> int:
        return self.digest.look_bytes()

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
            peaks.sub_(_RATES.to(peaks.device)[:, None])
            torch.maximum(peaks, row[:, :, None], out=peaks)

    def push_attended(self, selection: Tensor, maxima: Tensor, blocks: int) -> None:
        """As `push` of the row, but only what was attended is taken the logarithm of."""
        batch, heads, _ = selection.shape
        self.peaks.reserve(batch, heads, blocks, maxima.device)
        rates = _RATES.to(maxima.device)
        kernels.remember(self.peaks.data, rates, blocks, self.digest.estimate, selection, maxima)

    def choose(self, weights: Tensor, sinks: int, first_recent: int, blocks: int, free: int) -> Tensor:
        """Return `kernels.choose` of what `score` gives, in one call where the estimate is still to be computed."""
        taken = self.digest.take_asked() if sinks < first_recent else None
        if taken is None:
            return kernels.choose(self.score(weights, sinks, first_recent, blocks), sinks, first_recent, blocks, free)
        from attnpred.kernels import numba_digest  # numba is loaded when it is used, not before

        asked, prepared = taken
        if first_recent - sinks > self.distances.numel():
            self._distance(first_recent - sinks)
        self.digest.estimate, selection = numba_digest.choose(
            asked.query, prepared, asked.blocks, asked.selecting, self.peaks.data, weights, self.distances,
            sinks, first_recent, blocks, free,
        )  # fmt: skip
        return selection

    def features(self, first: int, last: int) -> Tensor:
        """Return [B, Hs, last - first, FEATURES], what `score` weighs: for training."""
        estimate, peaks = self.digest.estimate[..., first:last], self.peaks.view()[..., first:last]
        return torch.stack((estimate, *peaks.unbind(2), self._distance(last - first).expand_as(estimate)), -1)

    def _distance(self, blocks: int) -> Tensor:
        """Return [blocks], the logarithm of `blocks` to 1."""
        if blocks > self.distances.numel():
            size = blocks * 5 // 4 + 16
            self.distances = torch.arange(size, 0, -1, device=self.peaks.data.device, dtype=torch.float32).log2_()
        return self.distances[self.distances.numel() - blocks :]

    def score(self, weights: Tensor, first: int, last: int, blocks: int) -> Tensor:
        """Return [B, Hs, blocks]: scores of blocks `first` to `last`, all of them sealed; weights [Hs or 1, FEATURES]."""
        if first == last:  # there may be fewer sealed blocks than sinks
            return self.peaks.data.new_zeros(*self.digest.estimate.shape[:2], blocks)
        distance = self._distance(last - first)
        return kernels.weigh(self.digest.estimate, self.peaks.data, weights, distance, first, last, blocks)


@final
class StreamingNetwork(nn.Module):
    """Weights of forecast and correction, [layers, heads, FEATURES], and the digests' projections.

    layers, heads: of the model it was trained for, or 1 and 1 for weights that are shared by all; head_dim: D and rank:
    r of the projections, 0 for none (plain mean keys).
    """

    def __init__(self, layers: int = 1, heads: int = 1, head_dim: int = 0, rank: int = 0) -> None:
        super().__init__()
        start = torch.zeros(layers, heads, FEATURES, dtype=torch.float32, device="cpu")
        start[..., 0] = 1.0
        self.correction = nn.Parameter(start.clone())
        start[..., 1 : 1 + len(PEAKS)] = 1.0 / len(PEAKS)
        self.forecast = nn.Parameter(start)
        if rank:
            self.keys = nn.Parameter(torch.zeros(layers, heads, head_dim, rank, dtype=torch.float32, device="cpu"))
            self.queries = nn.Parameter(torch.zeros(layers, heads, head_dim, rank, dtype=torch.float32, device="cpu"))
            self.centre = nn.Parameter(torch.zeros(layers, heads, head_dim, dtype=torch.float32, device="cpu"))
            self.vectors = nn.Parameter(torch.ones(layers, heads, dtype=torch.float32, device="cpu"))
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
