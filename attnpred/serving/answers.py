"""`Answers`: the answers to one prompt while they are written, a token of each at a step; and the step of many of them.

A step is one call of the model for the rows of all requests, where their caches allow that (`attnpred.hf.rows`); else they
take turns. A row whose step fails takes nobody along: the others are put back to where they were, and go on by themselves.
"""

from collections.abc import Sequence
from contextlib import suppress
from typing import Any, final

import torch
from torch import Tensor

from attnpred.errors import AttnpredError
from attnpred.hf import TieredCache, cache_argument
from attnpred.hf.rows import CacheRows, can_be_row
from attnpred.serving.drawing import Drawer, Drawn
from attnpred.serving.job import Ended, Job, Said
from attnpred.serving.looking import Look, look

TOGETHER = 32
"""Rows of one call."""


@final
class Row:
    """One answer. cache: its own, closed by `close`; token: what the next step is called with."""

    def __init__(self, job: Job, number: int, cache: TieredCache) -> None:
        self.job, self.number, self.cache = job, number, cache
        self.drawer, self.teller = Drawer(job.drawing, number), job.tellers[number]
        self.token = self.count = 0
        self.is_over = False
        self._untold: list[tuple[Drawn, Look | None]] = []

    def take(self, logits: Tensor) -> None:
        """Draw the next token from logits [V], and tell what is certain of the text. The last step was of this row."""
        drawn = self.drawer.draw(logits)
        if drawn.token in self.job.ends:
            return self._end("stop", self.teller.finish())
        self.token, self.count = drawn.token, self.count + 1
        self._untold.append((drawn, look(self.cache) if self.job.looks else None))
        text = self.teller.add(drawn.token)
        if self.teller.is_stopped:
            self._end("stop", text)
        elif self.count >= self.job.most:
            self._end("length", text + self.teller.finish())
        elif text:
            self._tell(text)

    def _tell(self, text: str) -> None:
        tokens, looks = tuple(one for one, _ in self._untold), tuple(one for _, one in self._untold)
        self._untold = []
        self.job.tell(Said(self.number, text, tokens, looks))

    def _end(self, reason: str, text: str) -> None:
        if text or self._untold:
            self._tell(text)
        self.is_over = True
        self.job.tell(Ended(self.number, reason, self.cache.stats()))
        self.close()

    def close(self) -> None:
        """Free the cache."""
        self.cache.close()


def rows_of(job: Job, cache: TieredCache, logits: Tensor) -> list[Row]:
    """Return the answers to a prompt that `cache` holds, which is theirs from now on; each has its first token."""
    rows = [Row(job, number, cache.fork() if number else cache) for number in range(len(job.tellers))]
    for row in rows:
        row.take(logits)
    return rows


@torch.no_grad()
def step(model: Any, rows: Sequence[Row]) -> dict[Row, Exception]:
    """Take a step of every row; return those that failed, and why."""
    failed: dict[Row, Exception] = {}
    alone = [row for row in rows if not can_be_row(row.cache)]
    several = [row for row in rows if can_be_row(row.cache)]
    for first in range(0, len(several), TOGETHER):
        part = several[first : first + TOGETHER]
        if len(part) == 1 or not _step_together(model, part):
            alone += part
    for row in alone:
        try:
            tokens = torch.tensor([[row.token]], dtype=torch.int64, device=model.device)
            row.take(model(tokens, **cache_argument(row.cache), use_cache=True).logits[0, -1])
        except Exception as error:  # of a tier, a disk, a kernel: this answer alone is lost
            failed[row] = error
    return failed


def _step_together(model: Any, rows: Sequence[Row]) -> bool:
    """Take a step of several rows in one call; if it fails, put their caches back, and return False."""
    lengths = [row.cache.get_seq_length() for row in rows]
    tokens = torch.tensor([[row.token] for row in rows], dtype=torch.int64, device=model.device)
    places = torch.tensor([[length] for length in lengths], dtype=torch.int64, device=model.device)
    cache = CacheRows([row.cache for row in rows])
    try:
        logits = model(tokens, position_ids=places, **cache_argument(cache), use_cache=True).logits[:, -1]
    except (AttnpredError, RuntimeError, OSError):
        for row, length in zip(rows, lengths, strict=True):
            longest = max(row.cache.get_seq_length(index) for index in range(len(row.cache.layers)))
            if longest > length:
                with suppress(AttnpredError):  # what cannot go back fails in its own step
                    row.cache.crop(length - row.cache.get_seq_length())
        return False
    for row, one in zip(rows, logits, strict=True):
        row.take(one)
    return True
