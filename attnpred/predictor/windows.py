"""Windows: the pieces of a trace that a predictor learns from.

A window belongs to one query of one document and stands where inference stands just before that query: the rows of
the `history` queries before it are the input, its own row is the target. Both are cut to the blocks that a policy
scores: those that existed before the query, without the sinks and the recent window. A batch takes several
(layer, head) pairs of the same query, so that all its windows are equally wide.
"""

import functools
import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from attnpred.errors import TraceError
from attnpred.predictor.pretrained import SMALLEST_WIDTH
from attnpred.predictor.traces import TraceReader
from attnpred.shapes import num_blocks

_DOCUMENTS_IN_MEMORY = 8


@dataclass(frozen=True, slots=True)
class Window:
    """M windows of one query: fp32 `rows` [M, H, C], oldest first, `target` [M, C]; `blocks` is N before the query."""

    rows: Tensor
    target: Tensor
    blocks: int


class Windows:
    """Cuts windows out of the documents of `reader`, a few of which stay in memory.

    documents: names of those that are long enough for a window; the others are left out.
    """

    def __init__(self, reader: TraceReader, history: int, sink_blocks: int, recent_blocks: int) -> None:
        self.history, self.sink_blocks, self.recent_blocks = history, sink_blocks, recent_blocks
        self._block_size = reader.meta.block_size
        self._pairs = reader.meta.layers * reader.meta.heads
        self._load = functools.lru_cache(maxsize=_DOCUMENTS_IN_MEMORY)(reader.load)
        self._steps: dict[str, range] = {}
        # the first query with enough blocks to score comes after this many tokens
        enough = (sink_blocks + recent_blocks + SMALLEST_WIDTH - 1) * self._block_size + 1
        for name in reader.documents:
            size = reader.size(name)
            steps = range(max(history, enough - size.first), size.rows)
            if steps:
                self._steps[name] = steps
        self.documents = list(self._steps)
        if not self.documents:
            raise TraceError(
                f"got {len(reader.documents)} documents in {reader.folder}, none with more than {history} rows and a query after "
                f"{enough} tokens, expected longer ones: capture more rows or longer texts, or lower history, sinks or recent window"
            )

    def cut(self, name: str, step: int, pairs: Sequence[int]) -> Window:
        """Return the windows of row `step` of document `name` for `pairs`, each layer * Hs + head."""
        trace = self._load(name)
        blocks = num_blocks(trace.first + step, self._block_size)
        columns = slice(self.sink_blocks, blocks - self.recent_blocks)
        rows = trace.rows.flatten(0, 1)[list(pairs), step - self.history : step + 1, columns].float()
        return Window(rows[:, :-1], rows[:, -1], blocks)

    def draw(self, rng: random.Random, names: Sequence[str], count: int) -> Window:
        """Return `count` windows (as many as there are pairs, at most) of a random query of a random document."""
        name = rng.choice(names)
        step = rng.choice(self._steps[name])
        return self.cut(name, step, rng.sample(range(self._pairs), min(count, self._pairs)))


def ema(rows: Tensor, rate: float = 0.2) -> Tensor:
    """Return the exponential moving average [M, C] of `rows` [M, H, C]; it starts as the oldest row."""
    history = rows.shape[1]
    weights = rate * (1 - rate) ** torch.arange(history - 1, -1, -1, device=rows.device, dtype=rows.dtype)
    weights[0] /= rate
    return torch.einsum("h,mhc->mc", weights, rows)


def recovered_share(scores: Tensor, target: Tensor, count: int) -> Tensor:
    """Return [M], the `target` mass under the `count` best `scores` / under the best `count`; NaN without any mass.

    Both are [M, C]. Only the order of the scores counts, so a predictor of any scale is measured alike.
    """
    count = min(count, target.shape[-1])
    best = target.topk(count).values.sum(-1)
    got = target.gather(-1, scores.topk(count).indices).sum(-1)
    return got / best
