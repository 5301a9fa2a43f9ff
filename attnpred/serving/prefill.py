"""`Prefill`: a prompt on its way into a cache, a block of tokens at a time, so that others have their turns between.

All but the end of it is read with full attention, in the calls of `chain`: what the store has of them is taken, what it has
not is computed and kept. At the end a cache of the job's own policy takes the keys and values over, and reads the last
tokens by itself in one call; it is then as if it had read everything (`attnpred.hf.carry`), and the call gives the logits
of the first new token.
"""

from collections.abc import Sequence
from typing import Any, final

import torch
from torch import Tensor

from attnpred.config import CacheConfig
from attnpred.hf import TieredCache, carry_over, last_queries
from attnpred.hf.blocks import give_tokens, keeps_every_token, tokens_of
from attnpred.policies.base import Policy
from attnpred.policies.full import Full
from attnpred.serving.chain import BlockStore, chain


@final
class Prefill:
    """policy: None reads all full blocks and leaves the rest alone (a document). root: see `chain`."""

    def __init__(
        self,
        model: Any,
        store: BlockStore,
        root: str,
        ids: Sequence[int],
        policy: Policy[Any] | None,
        settings: CacheConfig,
    ) -> None:
        self.model, self.store, self.policy, self.settings = model, store, policy, settings
        self.ids = torch.tensor([ids], dtype=torch.int64, device=model.device)
        whole = len(ids) if policy is None else max(0, len(ids) - last_queries(settings))
        self.parts = chain(root, ids[:whole])
        self.border = self.parts[-1].stop if self.parts else 0
        self.total = self.border if policy is None else len(ids)
        self.reused = self.done = 0
        self.cache: TieredCache | None = None
        """What is read so far; after the last call the cache of the job's policy."""

    @torch.no_grad()
    def advance(self) -> Tensor | None:
        """Read a block more, or take up all that are here; return the logits [V] of the first new token at the end."""
        if self.cache is None and self.border:
            self.cache = TieredCache(self.model.config, policy=Full(), config=_in_memory(self.settings))
        if self.done < self.border:
            assert self.cache is not None
            self._read_block(self.cache)
            return None
        return self._finish() if self.policy is not None else None

    @property
    def is_over(self) -> bool:
        """Whether nothing is left to read."""
        return self.done >= self.total

    def _read_block(self, cache: TieredCache) -> None:
        is_kept = keeps_every_token(cache)
        left = [part for part in self.parts if part.start >= self.done]
        here = self.store.take([part.name for part in left]) if is_kept else []
        if here:
            give_tokens(cache, here, self.model.device)
            stop = left[len(here) - 1].stop
            self.reused += stop - self.done
            self.done = stop
            return
        part = left[0]
        self.model(self.ids[:, part.start : part.stop], cache=cache, use_cache=True, logits_to_keep=1)
        self.done = part.stop
        if is_kept:
            self.store.put(part.name, tokens_of(cache, part.start, part.stop))

    def _finish(self) -> Tensor:
        assert self.policy is not None
        whole, self.cache = self.cache, TieredCache(self.model.config, policy=self.policy, config=self.settings)
        if whole is not None:
            with whole:
                carry_over(whole, self.cache)
        self.cache.admit(self.total, 1, self.model.dtype)
        out = self.model(self.ids[:, self.done :], cache=self.cache, use_cache=True, logits_to_keep=1)
        self.done = self.total
        found: Tensor = out.logits[0, -1]
        return found

    def close(self) -> None:
        """Free what was read, where no answer goes on from it."""
        if self.cache is not None:
            self.cache.close()
            self.cache = None


def _in_memory(settings: CacheConfig) -> CacheConfig:
    """Return settings for a text while it is read: all of it in fast memory."""
    return CacheConfig(block_size=settings.block_size, num_sink_tokens=0, recent_window=settings.block_size or 16)
