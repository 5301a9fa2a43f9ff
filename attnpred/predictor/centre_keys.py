"""`CentreKeys`: one key of every block, the one in its middle, and a search for the blocks that a query wants most.

The search is a beam over a binary tree (HiP, arXiv 2406.09827): stretches of blocks, each represented by the centre key of
the block in its middle, are halved round by round, and the `free` best halves go on, until a stretch is one block. So it
scores about 2 `free` keys in each of log2(N / free) rounds, and never all N. What is on the way dropped is never looked at,
which is what makes it cheap, and also what it can miss: a single wanted block in a stretch whose middle says nothing.
"""

from collections.abc import Sequence
from typing import ClassVar, final

import torch
from torch import Tensor

from attnpred.predictor.memory import Columns, Memory

UNSEEN = -1e9
"""The score of a block that the search did not reach: below every logit, and finite."""


@final
class CentreKeys(Memory):
    """scored: keys per kv head that the last search looked at."""

    remembers: ClassVar[tuple[str, ...]] = ("_sealed",)

    def __init__(self, block_size: int) -> None:
        self.block_size = block_size
        self.table = Columns()
        self.clear()

    def clear(self) -> None:
        self.table.clear()
        self._sealed = self.scored = 0
        self.query = torch.empty(0, dtype=torch.float32, device="cpu")

    def tables(self) -> Sequence[Columns]:
        return (self.table,)

    @property
    def sealed(self) -> int:
        return self._sealed

    @property
    def is_empty(self) -> bool:
        return self._sealed == 0

    def look_bytes(self) -> int:
        per_head = self.scored * self.table.data.shape[-1] * self.table.data.element_size() if self._sealed else 0
        return per_head * self.query.shape[0] * self.query.shape[1]

    def seal(self, keys: Tensor) -> None:
        if self._sealed == 0:
            self.table = Columns(after=(keys.shape[3],), dtype=keys.dtype)
        new = keys[:, :, self.block_size // 2 :: self.block_size]
        stored = self.table.reserve(keys.shape[0], keys.shape[1], self._sealed + new.shape[2], keys.device)
        stored[:, :, self._sealed :] = new
        self._sealed += new.shape[2]

    def crop(self, columns: int) -> None:
        self._sealed = min(self._sealed, max(0, columns - 1))
        super().crop(self._sealed)

    def look(self, query: Tensor, scale: float, selecting: int) -> None:
        self.query = query.float().unflatten(1, (selecting, -1)) * scale  # [B, Hs, G, D]

    def search(self, first: int, last: int, free: int) -> Tensor:
        """Return [B, Hs, last - first]: logits of `free` of the blocks `first` to `last`, `UNSEEN` for the others."""
        batch, heads = self.query.shape[:2]
        scores = self.query.new_full((batch, heads, last - first), UNSEEN)
        if free <= 0 or last <= first:
            return scores
        edges = torch.arange(free + 1, device=scores.device) * (last - first) // free + first
        starts, stops = (edge.expand(batch, heads, -1) for edge in (edges[:-1], edges[1:]))
        self.scored = 0
        for _ in range(((last - first + free - 1) // free - 1).bit_length()):
            middle = (starts + stops) // 2
            starts, stops = torch.cat((starts, middle), -1), torch.cat((middle, stops), -1)
            kept = self._score(starts, stops).topk(free, -1).indices
            starts, stops = starts.gather(2, kept), stops.gather(2, kept)
        return scores.scatter(2, starts - first, self._score(starts, stops))

    def _score(self, starts: Tensor, stops: Tensor) -> Tensor:
        """Return the largest logit over a group of the key in the middle of each stretch [B, Hs, S]; -inf for empty ones."""
        self.scored += starts.shape[2]
        table = self.table.view()
        head = torch.arange(starts.shape[1], device=starts.device) * table.shape[1] // starts.shape[1]
        row = torch.arange(starts.shape[0], device=starts.device)[:, None, None]
        middle = ((starts + stops - 1) // 2).clamp(0, self._sealed - 1)
        keys = table[row, head[:, None], middle].float()
        logits = (self.query @ keys.transpose(-1, -2)).amax(2)
        return logits.masked_fill(stops <= starts, -torch.inf)
