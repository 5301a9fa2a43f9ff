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
from attnpred.hf import TieredCache, cache_argument, carry_over, last_queries
from attnpred.hf.blocks import give_tokens, keeps_every_token, tokens_of
from attnpred.policies.base import Policy
from attnpred.policies.full import Full
from attnpred.serving.chain import BlockStore, chain
from attnpred.serving.seeds import Seeds, key_of


@final
class Prefill:
    """policy: None reads all full blocks and leaves the rest alone (a document). root: see `chain`.

    common: so many tokens, those up to the end of documents, are read apart from the question (`seeds`); 0: there are none.
    """

    def __init__(
        self,
        model: Any,
        store: BlockStore,
        seeds: Seeds,
        root: str,
        ids: Sequence[int],
        policy: Policy[Any] | None,
        settings: CacheConfig,
        common: int = 0,
    ) -> None:
        self.model, self.store, self.seeds, self.policy, self.settings = model, store, seeds, policy, settings
        self.ids = torch.tensor([ids], dtype=torch.int64, device=model.device)
        self.common = common if policy is not None else 0
        whole = len(ids) if policy is None else max(0, (self.common or len(ids)) - last_queries(settings))
        self.parts = chain(root, ids[:whole])
        self.border = self.parts[-1].stop if self.parts else 0
        self.total = self.border if policy is None else len(ids)
        self.key = None if policy is None or not self.common else key_of(root, ids[: self.common], policy, settings)
        self.reused = self.done = 0
        self.cache: TieredCache | None = None
        """What is read so far; after the last call the cache of the job's policy."""

    @torch.no_grad()
    def advance(self) -> Tensor | None:
        """Read a block more, or take up all that are here; return the logits [V] of the first new token at the end."""
        if self.key is not None and not self.done and self._take_seed():
            return None
        if self.done < self.border:
            self._read_block()
            return None
        if self.policy is None:
            return None
        if self.done < self.common or not self.common:
            logits = self._take_over(self.policy, self.common or self.total)
            if self.common:
                self._keep_seed()
                return None
            return logits
        return self._read_to(self.total)

    @property
    def is_over(self) -> bool:
        """Whether nothing is left to read."""
        return self.done >= self.total

    def _read_block(self) -> None:
        """Take up all blocks that are here, or else read one."""
        if self.cache is None:
            self.cache = TieredCache(self.model.config, policy=Full(), config=_in_memory(self.settings))
        cache, is_kept = self.cache, keeps_every_token(self.cache)
        left = [part for part in self.parts if part.start >= self.done]
        here = self.store.take([part.name for part in left]) if is_kept else []
        if here:
            give_tokens(cache, here, self.model.device)
            stop = left[len(here) - 1].stop
            self.reused += stop - self.done
            self.done = stop
            return
        part = left[0]
        self._read_to(part.stop)
        if is_kept:
            self.store.put(part.name, tokens_of(cache, part.start, part.stop))

    def _take_over(self, policy: Policy[Any], stop: int) -> Tensor:
        """Give what was read to a cache of `policy`, which reads on to `stop` by itself."""
        whole, self.cache = self.cache, TieredCache(self.model.config, policy=policy, config=self.settings)
        if whole is not None:
            with whole:
                carry_over(whole, self.cache)
        self.cache.admit(self.total, 1, self.model.dtype)
        return self._read_to(stop)

    def _read_to(self, stop: int) -> Tensor:
        """Read the tokens up to `stop` in one call; return the logits of the last one."""
        assert self.cache is not None
        tokens = self.ids[:, self.done : stop]
        out = self.model(tokens, **cache_argument(self.cache), use_cache=True, logits_to_keep=1)
        self.done = stop
        found: Tensor = out.logits[0, -1]
        return found

    def _take_seed(self) -> bool:
        assert self.key is not None
        self.cache = self.seeds.take(self.key)
        if self.cache is None:
            return False
        self.done = self.reused = self.common
        return True

    def _keep_seed(self) -> None:
        assert self.key is not None and self.cache is not None
        self.seeds.put(self.key, self.cache)

    def close(self) -> None:
        """Free what was read, where no answer goes on from it."""
        if self.cache is not None:
            self.cache.close()
            self.cache = None


def _in_memory(settings: CacheConfig) -> CacheConfig:
    """Return settings for a text while it is read: all of it in fast memory."""
    return CacheConfig(block_size=settings.block_size, num_sink_tokens=0, recent_window=settings.block_size or 16)
