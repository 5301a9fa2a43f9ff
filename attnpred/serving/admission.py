"""`Admission`: how much memory the requests that run may take together, by the estimate of what their caches will take.

A request is admitted for its longest answer, before its first token. What can never fit is refused; what does not fit now
waits until others have ended. So the memory is never found too small in the middle of an answer.
"""

from functools import lru_cache
from typing import Any, final

from attnpred.config import CacheConfig
from attnpred.errors import TierFullError
from attnpred.hf import estimate_for
from attnpred.policies.base import Policy
from attnpred.policies.full import Full
from attnpred.serving.job import Job
from attnpred.store.estimate import readable

STEP = 128
"""Tokens to which a context is rounded up: an estimate takes a moment, and is kept."""


@final
class Admission:
    """limit: bytes for the caches of all requests that run."""

    def __init__(self, model: Any, limit: int) -> None:
        self.config, self.dtype, self.limit, self.taken = model.config, model.dtype, limit, 0
        self._known = lru_cache(maxsize=256)(self._estimate)

    def size(self, job: Job) -> int:
        """Return the bytes that the caches of `job` will take: of its answers, or of its prompt while that is read."""
        whole = self._known(Full(), CacheConfig(block_size=job.settings.block_size or 16), _rounded(len(job.ids)))
        if job.policy is None:
            return whole
        rows = len(job.tellers) * self._known(job.policy, job.settings, _rounded(len(job.ids) + job.most))
        return max(rows, whole) if job.settings.offload is None else rows + whole

    def check(self, job: Job) -> None:
        """Note what `job` will take. Raises `TierFullError` if that is more than all requests may take together."""
        job.bytes = self.size(job)
        if job.bytes > self.limit:
            raise TierFullError(
                f"got a request whose cache takes {readable(job.bytes)}, expected at most {readable(self.limit)} "
                f"(memory_limit): shorten the prompt, lower max_tokens or n, or raise the limit"
            )

    def fits(self, job: Job) -> bool:
        """Return whether there is room for `job` now."""
        return self.taken + job.bytes <= self.limit

    def take(self, job: Job) -> None:
        """Give `job` its room."""
        self.taken += job.bytes

    def give_back(self, job: Job) -> None:
        """`job` has ended."""
        self.taken -= job.bytes

    def _estimate(self, policy: Policy[Any], settings: CacheConfig, tokens: int) -> int:
        found = estimate_for(self.config, settings, policy, self.dtype, tokens)
        return found.fast + found.host


def _rounded(tokens: int) -> int:
    return -(-tokens // STEP) * STEP
