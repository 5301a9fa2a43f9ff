"""`sepllm`: initial tokens, separators and neighbours; the rest is dropped for good (SepLLM, arXiv 2412.12094).

A separator (a mark of punctuation, a space, a tab, a new line) carries what the segment before it said, so of a long text
the separators stay, beside the first and the newest tokens. As published for endless text: when their own places are
full, the oldest of them goes, and what the budget has left over is for more of the newest tokens.

The published method works on tokens. Here a block counts by the separators in it, the newest of two alike first; with blocks
of 16 nearly all have one, so `block_size=1` is the published method, and both are worth comparing (`sepllm:block_size=1`).
Published: 4 initial tokens, 64 separators, 256 neighbours, 800 in all; the first and the last are settings of the cache.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, final

import torch
from torch import Tensor

from attnpred.config import CacheConfig
from attnpred.errors import ConfigError
from attnpred.policies.base import Policy, View
from attnpred.predictor.memory import Columns, Memory

MARKS = frozenset(".,?!;: \t\n")


@final
class Separators(Memory):
    """Where the separators are: [B, 1, N, P], for the token ids `wanted`."""

    def __init__(self, wanted: Sequence[int], block_size: int) -> None:
        self.wanted = torch.tensor(wanted, dtype=torch.int64, device="cpu")
        self.block_size = block_size
        self.marks = Columns(after=(block_size,), dtype=torch.uint8)

    def tables(self) -> Sequence[Columns]:
        return (self.marks,)

    def read(self, tokens: Tensor, length: int) -> None:
        found = torch.isin(tokens, self.wanted.to(tokens.device)).to(torch.uint8)
        kept = self.marks.reserve(tokens.shape[0], 1, -(-length // self.block_size), tokens.device)
        places = torch.arange(length - tokens.shape[1], length, device=tokens.device)
        kept[:, 0, places // self.block_size, places % self.block_size] = found

    def counts(self) -> Tensor:
        """Return how many separators each block has, [B, 1, N]."""
        if not self.marks.count:
            if self.wanted.numel():
                raise ConfigError(
                    "got no token ids, expected them: run this policy in a model inside attnpred.attach(model)"
                )
            return torch.zeros(1, 1, 0, dtype=torch.float32, device="cpu")
        return self.marks.view().sum(-1, dtype=torch.float32)


@final
@dataclass(frozen=True, slots=True)
class SepLLM(Policy[Separators]):
    """Keep separators and neighbours.

    separators: their token ids; by name, the policy takes those of the model's tokenizer (`for_tokenizer`). most: how many
    separators are kept beyond the neighbours, the newest ones. neighbours: newest tokens that are kept in any case.
    """

    kind: ClassVar[str] = "eviction"
    cost: ClassVar[str] = "N counts"
    source: ClassVar[str] = "arXiv 2412.12094"
    evicts: ClassVar[bool] = True
    reads_tokens: ClassVar[bool] = True
    separators: tuple[int, ...] = ()
    most: int = 64
    neighbours: int = 256

    def __post_init__(self) -> None:
        object.__setattr__(self, "separators", tuple(self.separators))  # a saved cache has them as a list
        for name, value in (("most", self.most), ("neighbours", self.neighbours)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 0:
                raise ConfigError(f"got {name}={value!r}, expected a whole number of tokens of at least 0")
        if not all(isinstance(token, int) and token >= 0 for token in self.separators):
            raise ConfigError(f"got separators={self.separators!r:.60}, expected token ids")

    @classmethod
    def for_tokenizer(cls, tokenizer: Any) -> "SepLLM":
        """Return the policy with the ids of all tokens that are made of separators alone."""
        texts = tokenizer.batch_decode([[i] for i in range(len(tokenizer))])
        return cls(tuple(i for i, text in enumerate(texts) if text and MARKS.issuperset(text)))

    def memory(self, config: CacheConfig, layer: int) -> Separators:
        return Separators(self.separators, config.block_size)

    def score(self, view: View[Separators]) -> Tensor:
        memory, blocks = view.memory, view.zone.blocks
        counts = memory.counts()
        known = torch.nn.functional.pad(counts, (0, max(0, blocks - counts.shape[-1])))[..., :blocks]
        newest = torch.arange(blocks, device=known.device, dtype=torch.float32)
        first = max(0, view.zone.length - self.neighbours) // memory.block_size
        older = known * (newest < first)
        # how many separators come after those of a block, but before the neighbours: the oldest have no place
        after = older.flip(-1).cumsum(-1).flip(-1) - older
        counted = torch.minimum(older, (self.most - after).clamp_min(0))
        return (
            torch.where(
                newest < first,
                counted * blocks,
                torch.tensor(float((memory.block_size + 1) * blocks), dtype=torch.float32, device="cpu"),
            )
            + newest
        )
