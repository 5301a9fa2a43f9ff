"""`Average`: one row that sums up all rows so far: row <- keep * row + gain * new. The first row is taken as it is.

keep = 0, gain = 1 is the last row; keep = 1 - r, gain = r an exponential moving average; keep = gain = 1 the
accumulated attention of H2O (arXiv 2306.14048). A block that was not attended counts as zero.
"""

from collections.abc import Sequence
from typing import ClassVar, final

from torch import Tensor

from attnpred.predictor.memory import Columns, Memory


@final
class Average(Memory):
    """One fp32 row per head; `prompt_rows` of a prompt's last rows go into it, or, if `every`, all of them."""

    remembers: ClassVar[tuple[str, ...]] = ("is_fresh",)

    def __init__(self, keep: float, gain: float, prompt_rows: int, every: bool = False) -> None:
        self.keep, self.gain, self.rows, self.every = keep, gain, prompt_rows, every
        self.row = Columns()
        self.is_fresh = True

    def tables(self) -> Sequence[Columns]:
        return (self.row,)

    @property
    def is_empty(self) -> bool:
        return self.is_fresh

    def clear(self) -> None:
        super().clear()
        self.is_fresh = True

    def push(self, rows: Tensor, attended: Tensor | None = None) -> None:
        current = self.row.reserve(rows.shape[0], rows.shape[1], rows.shape[3], rows.device)
        if self.every and self.keep == self.gain == 1:  # they may be many
            current.add_(rows.to(current.dtype).sum(2))
            self.is_fresh = False
            return
        for new in rows.to(current.dtype).unbind(2):
            if self.is_fresh:
                current.copy_(new)
                self.is_fresh = False
            else:
                current.mul_(self.keep).add_(new, alpha=self.gain)
