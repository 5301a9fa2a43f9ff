"""`Reader`: a cache that holds a text, from a kept file in a moment, or by reading the text in chunks.

Policies that look at the attention of all queries of a text, or at its words, need more than its keys and values and its
last queries. They read all of it themselves, in one call, and nothing is kept.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor

from attnpred.config import CacheConfig
from attnpred.errors import CacheFileError, StoreError, TierFullError
from attnpred.hf import TieredCache, carry_over, estimate_for, is_carried, last_queries
from attnpred.policies.base import Policy
from attnpred.policies.full import Full
from attnpred.serving.kept import KeptTexts

logger = logging.getLogger("attnpred")

CHUNK = 512
"""Tokens read between two reports. Chunks of 256 to 4,096 take the same time (SmolLM2, 4,096 tokens, one core)."""

SHORT = 512
"""A text of fewer tokens is read in one call, and not kept. (More than `last_queries`.)"""

Report = Callable[[int, int], None]
"""Told how many tokens of how many have been read."""


def quietly(done: int, total: int) -> None:
    """Report nothing."""


@final
@dataclass(frozen=True, slots=True)
class Reader:
    """model: an attached one. report: told of every text that has to be read. chunk, short: see the constants."""

    model: Any
    kept: KeptTexts
    report: Report = quietly
    chunk: int = CHUNK
    short: int = SHORT

    def read(self, ids: Sequence[int], policy: Policy[Any], settings: CacheConfig) -> TieredCache:
        """Return a cache of the text `ids`, as if `policy` had read it in one call.

        Raises `TierFullError` before it begins if there is no room for it.
        """
        config, tokens = self.model.config, torch.tensor([ids], device=self.model.device, dtype=torch.int64)
        settings = policy.settle(settings)
        shares = settings.layer_groups is not None
        if len(ids) < self.short or shares or not is_carried(policy, settings):
            cache = TieredCache(config, policy=policy, config=settings)
            self._feed(cache, tokens, self.report)
            return cache
        path = self.kept.path(self.model, ids, settings)
        if self.kept.has(path):
            try:
                return self._take_up(path, tokens, policy, settings)
            except TierFullError:
                raise
            except (CacheFileError, StoreError) as error:  # damaged, or of another version
                logger.warning("%s: the text is read again", error)
                path.unlink(missing_ok=True)
        return self._read(path, tokens, policy, settings)

    def _read(self, path: Path, tokens: Tensor, policy: Policy[Any], settings: CacheConfig) -> TieredCache:
        """Read the text in chunks but for its end, keep that if nothing speaks against it, and go on with `policy`."""
        text = tokens[:, : tokens.shape[1] - last_queries(settings)]
        size = estimate_for(self.model.config, settings, Full(), self.model.dtype, text.shape[1]).full
        refusal = self.kept.refusal(size)
        with TieredCache(self.model.config, policy=Full(), config=settings) as whole:
            self._feed(whole, text, self.report, self.chunk)
            if refusal is None:
                try:
                    self.kept.keep(path, whole, text)
                    return self._take_up(path, tokens, policy, settings)
                except CacheFileError as error:  # the disk is full, or the file was removed
                    refusal = str(error)
            if self.kept.limit:
                logger.warning("the text has to be read again the next time: %s", refusal)
            cache = TieredCache(self.model.config, policy=policy, config=settings)
            carry_over(whole, cache)
        self._feed(cache, tokens[:, text.shape[1] :])
        return cache

    def _take_up(self, path: Path, tokens: Tensor, policy: Policy[Any], settings: CacheConfig) -> TieredCache:
        cache = self.kept.load(path, self.model, tokens, policy, settings)
        try:
            self._feed(cache, tokens[:, cache.get_seq_length() :])
        except BaseException:
            cache.close()
            raise
        return cache

    def read_on(self, cache: TieredCache, ids: Sequence[int]) -> None:
        """Read what `ids` have beyond the cache."""
        self._feed(cache, torch.tensor([ids[cache.get_seq_length() :]], device=self.model.device, dtype=torch.int64))

    @torch.no_grad()
    def _feed(self, cache: TieredCache, tokens: Tensor, report: Report = quietly, chunk: int | None = None) -> None:
        """Read `tokens` [1, L]: in one call, or in calls of `chunk` tokens, of which none is of a single one: a step."""
        total, done = tokens.shape[1], 0
        cache.admit(cache.get_seq_length() + total, 1, self.model.dtype)
        while done < total:
            report(done, total)
            size = chunk if chunk is not None and total - done > chunk + 1 else total - done
            part = tokens[:, done : done + size]
            self.model(part, cache=cache, use_cache=True, logits_to_keep=1)
            done += size
        report(total, total)
