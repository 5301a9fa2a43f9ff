"""`KeptTexts`: the caches of texts that were read, in a folder of the user's own, so that no text is read twice.

A file is named by a hash of all that its keys depend on: the tokens, the model and the kind of its numbers. It ends some
tokens before the text does (`last_queries`), and remembers nothing for a policy: whichever policy comes reads these, and is
then where it would be had it read the whole text in one call. So one file serves all policies and budgets.

When the folder holds more than its limit, the files that were used longest ago go. Files have mode 0600, for they hold
what the text says.
"""

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor

from attnpred.config import CacheConfig
from attnpred.folders import user_cache
from attnpred.hf import TieredCache, last_queries, load_keys, made_by
from attnpred.policies.base import Policy
from attnpred.serving.keeping import make_room, mark_used, why_unusable
from attnpred.store.estimate import free_disk_bytes, readable

LIMIT = 8 << 30
"""Bytes: about 25 texts of 7,000 tokens for SmolLM2 in 32 bits."""


_NAME = re.compile(r"[0-9a-f]{64}\.kv")
"""Of `KeptTexts.path`."""


@final
@dataclass(frozen=True, slots=True)
class KeptTexts:
    """folder: made when it is needed. limit: bytes of all files together; 0 keeps nothing, and uses no file."""

    folder: Path | None
    limit: int = LIMIT

    @classmethod
    def of_user(cls, limit: int = LIMIT) -> "KeptTexts":
        """Return those in the user's cache folder."""
        folder = user_cache()
        return cls(None if folder is None else folder / "texts", limit)

    def path(self, model: Any, ids: Sequence[int], settings: CacheConfig) -> Path:
        """Return where the cache of the text `ids` is, or would be."""
        known = [made_by(model), settings.block_size, last_queries(settings), settings.offload_dtype]
        digest = hashlib.sha256(repr(known).encode())
        digest.update(torch.tensor(ids, dtype=torch.int64, device="cpu").numpy().tobytes())
        return (self.folder or Path()) / f"{digest.hexdigest()}.kv"

    def has(self, path: Path) -> bool:
        """Return whether there is a file at `path` that nobody else can have written."""
        return self.limit > 0 and path.is_file() and self._why_not() is None

    def refusal(self, size: int) -> str | None:
        """Return why a cache of `size` bytes cannot be kept; None if it can, and the folder is there."""
        if size > self.limit:
            return f"its {readable(size)} are more than the limit of {readable(self.limit)}"
        why = self._why_not()
        if why is None and self.folder is not None and size > (free := free_disk_bytes(self.folder)):
            return f"its {readable(size)} are more than the {readable(free)} that {self.folder} has left"
        return why

    def _why_not(self) -> str | None:
        """Return why the folder cannot be used; None if it can."""
        if self.folder is None:
            return "the user has no folder for it"
        return why_unusable(self.folder)

    def load(self, path: Path, model: Any, ids: Tensor, policy: Policy[Any], settings: CacheConfig) -> TieredCache:
        """Return the cache at `path`, ready for `policy` to read the rest of `ids`. Raises `CacheFileError`."""
        cache = load_keys(path, model, ids, policy, settings)
        mark_used(path)
        return cache

    def keep(self, path: Path, cache: TieredCache, ids: Tensor) -> None:
        """Save `cache`, which holds `ids`, and let go what has no room beside it. Raises `CacheFileError`."""
        cache.save(path, ids)
        make_room(path.parent, _NAME, self.limit, path)
