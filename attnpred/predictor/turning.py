"""`Turning`: bounds of every block's keys, what they gave for the last two queries, and how much the query has turned.

For a policy that keeps the choice of the last query while the new one is like it (FreeKV, arXiv 2505.13109).
"""

from collections.abc import Mapping, Sequence
from typing import ClassVar, final

import torch
from torch import Tensor

from attnpred.predictor.key_summary import KeySummary
from attnpred.predictor.memory import Columns, Memory


def likeness(one: Tensor, other: Tensor, selecting: int) -> Tensor:
    """Return the cosine of queries [B, Hq, D], a mean over the heads that select together, [B, Hs]."""
    cosine = torch.nn.functional.cosine_similarity(one.float(), other.float(), dim=-1)
    return cosine.unflatten(1, (selecting, -1)).mean(2)


@final
class Turning(Memory):
    """before [B, Hs, N]: the estimate for the query before the last; likeness [B, Hs]: of these two queries."""

    remembers: ClassVar[tuple[str, ...]] = ("query", "before", "likeness")

    def __init__(self, block_size: int) -> None:
        self.bounds = KeySummary(block_size, bounds=True)
        self.clear()

    def tables(self) -> Sequence[Columns]:
        return ()

    def parts(self) -> Mapping[str, Memory]:
        return {"bounds": self.bounds}

    def clear(self) -> None:
        super().clear()
        self.query = self.before = self.likeness = torch.empty(0, dtype=torch.float32, device="cpu")

    @property
    def sealed(self) -> int:
        return self.bounds.sealed

    @property
    def is_empty(self) -> bool:
        return self.bounds.estimate.numel() == 0

    def look_bytes(self) -> int:
        return self.bounds.look_bytes()

    def seal(self, keys: Tensor) -> None:
        self.bounds.seal(keys)

    def look(self, query: Tensor, scale: float, selecting: int) -> None:
        self.before = self.bounds.estimate if self.query.numel() else self.query
        if self.before.numel():
            self.likeness = likeness(query, self.query, selecting)
        self.query = query.clone()
        self.bounds.look(query, scale, selecting)

    def crop(self, columns: int) -> None:
        super().crop(columns)
        # What was said of blocks that are gone, or of tokens that come anew, is no choice to keep to.
        self.query = self.before = self.likeness = torch.empty(0, dtype=torch.float32, device="cpu")

    def select(self, rows: Tensor) -> None:
        super().select(rows)
        self._map(lambda x: x[rows.to(x.device)])

    def repeat(self, times: int) -> None:
        super().repeat(times)
        self._map(lambda x: x.repeat_interleave(times, 0))
