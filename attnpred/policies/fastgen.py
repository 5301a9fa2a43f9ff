"""`fastgen`: each head keeps the cheapest kind of tokens that holds most of its attention (FastGen, arXiv 2310.01801).

At the end of the prompt each head is profiled: of the compositions

    special | + punctuation | + the share r_f of tokens with most attention so far | + the last share r_l | everything

it takes the first with at least `mass` (T) of the attention that the queries of the prompt gave; local is, for each query,
what is in the last r_l of its own context. The choice is fixed for the whole decode, and applied anew at every step: tokens
that come are kept by their kind, the local window moves on. So heads differ in how much they keep, from a few blocks to
all of them, and the store frees memory head by head.

The paper has no budget. Here it is the most that a head keeps: of a composition larger than that, what has most attention
so far stays. With a budget just below the whole context (`--budget 0.99`) it is as published: a head that keeps everything
keeps all but a hundredth. Sinks and recent window of the cache belong to every composition.

The published method works on tokens, and on each query head alone. Here blocks are kept, one choice per kv head, by rows
of this library: the largest probability in a block, over the heads that share keys; the mass is the share of their sum. Of
a kind with n tokens, the n / P blocks with most of them stay, so that a kind costs what it costs by tokens: nearly every
block of 16 has some punctuation. With `block_size=1` and no groups it is the published method (`fastgen:block_size=1`).
Published: T = 0.95, r_f = r_l = 0.3. Every later call of several tokens is the end of a prompt as well: it is profiled by
itself, and chooses among what is left.
"""

import math
import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, final

import torch
from torch import Tensor

from attnpred.config import CacheConfig
from attnpred.errors import ConfigError
from attnpred.policies.base import Policy, View, widened
from attnpred.policies.select import Zone
from attnpred.policies.sepllm import Separators
from attnpred.predictor.memory import Columns, Memory

PUNCTUATION = frozenset(string.punctuation)


@final
class Profile(Memory):
    """total, near [B, Hs, N]: attention of all queries to each block, and that of queries for which it was local.

    choice [B, Hs]: number of the composition of each head, empty before there is one; seen: queries so far.
    """

    rows, every = 1, True
    remembers: ClassVar[tuple[str, ...]] = ("choice", "seen")

    def __init__(self, special: Sequence[int], punctuation: Sequence[int], local: float, block_size: int) -> None:
        self.special, self.punctuation = Separators(special, block_size), Separators(punctuation, block_size)
        self.total, self.near = Columns(), Columns()
        self.local, self.block_size = local, block_size
        self.choice, self.seen = torch.empty(0, dtype=torch.float32, device="cpu"), 0

    def tables(self) -> Sequence[Columns]:
        return (self.total, self.near)

    def parts(self) -> Mapping[str, Memory]:
        return {"special": self.special, "punctuation": self.punctuation}

    @property
    def is_empty(self) -> bool:
        return not self.total.count

    def clear(self) -> None:
        super().clear()
        self.choice, self.seen = torch.empty(0, dtype=torch.float32, device="cpu"), 0

    def read(self, tokens: Tensor, length: int) -> None:
        self.special.read(tokens, length)
        self.punctuation.read(tokens, length)

    def push(self, rows: Tensor, attended: Tensor | None = None) -> None:
        batch, heads, count, blocks = rows.shape
        total, near = (x.reserve(batch, heads, blocks, rows.device) for x in self.tables())
        if count > 1 and self.choice.numel():  # another prompt
            total.zero_()
            near.zero_()
            self.choice = torch.empty(0, dtype=torch.float32, device="cpu")
        begins = [first_local(self.seen + i + 1, self.local) // self.block_size for i in range(count)]
        self.seen += count
        is_near = (
            torch.arange(blocks, device=rows.device)
            >= torch.tensor(begins, device=rows.device, dtype=torch.int64)[:, None]
        )
        total.add_(rows.float().sum(2))
        near.add_((rows.float() * is_near).sum(2))

    def crop(self, columns: int) -> None:
        super().crop(columns)
        self.seen = min(self.seen, columns * self.block_size)

    def select(self, rows: Tensor) -> None:
        super().select(rows)
        self._map(lambda x: x[rows.to(x.device)])

    def repeat(self, times: int) -> None:
        super().repeat(times)
        self._map(lambda x: x.repeat_interleave(times, 0))


def first_local(length: int, share: float) -> int:
    """Return the first of the last `share` of so many tokens."""
    return length - math.ceil(share * length - 1e-9)


def _most(scores: Tensor, count: Tensor | int) -> Tensor:
    """Return which of scores [B, H, N] are among the `count` largest, the newest of equals; count [B, H, 1] or a number."""
    order = scores.flip(-1).argsort(dim=-1, descending=True, stable=True)
    ranks = torch.arange(scores.shape[-1], device=scores.device)
    return torch.zeros_like(scores, dtype=torch.bool).scatter(-1, order, (ranks < count).expand(scores.shape)).flip(-1)


@final
@dataclass(frozen=True, slots=True)
class FastGen(Policy[Profile]):
    """Keep, head by head, the cheapest kinds of tokens that hold most of the attention.

    special, punctuation: token ids; by name, the policy takes those of the model's tokenizer (`for_tokenizer`). mass: T, how
    much of a head's attention its composition must hold. frequent, local: r_f and r_l, shares of the context.
    """

    kind: ClassVar[str] = "eviction"
    cost: ClassVar[str] = "N log N; every row of the prompt"
    source: ClassVar[str] = "arXiv 2310.01801"
    evicts: ClassVar[bool] = True
    leaves_out: ClassVar[bool] = True
    reads_tokens: ClassVar[bool] = True
    special: tuple[int, ...] = ()
    punctuation: tuple[int, ...] = ()
    mass: float = 0.95
    frequent: float = 0.3
    local: float = 0.3

    def __post_init__(self) -> None:
        for name in ("special", "punctuation"):
            ids = tuple(getattr(self, name))  # a saved cache has them as a list
            object.__setattr__(self, name, ids)
            if not all(isinstance(token, int) and token >= 0 for token in ids):
                raise ConfigError(f"got {name}={ids!r:.60}, expected token ids")
        for name in ("mass", "frequent", "local"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
                of = "attention" if name == "mass" else "context"
                raise ConfigError(f"got {name}={value!r}, expected a share of the {of} from 0 to 1")

    @classmethod
    def for_tokenizer(cls, tokenizer: Any) -> "FastGen":
        """Return the policy with the tokenizer's special tokens, and all tokens that are punctuation alone."""
        texts = [text.strip() for text in tokenizer.batch_decode([[i] for i in range(len(tokenizer))])]
        special = sorted({int(i) for i in tokenizer.all_special_ids})
        marks = (i for i, text in enumerate(texts) if text and PUNCTUATION.issuperset(text) and i not in special)
        return cls(tuple(special), tuple(marks))

    def memory(self, config: CacheConfig, layer: int) -> Profile:
        return Profile(self.special, self.punctuation, self.local, config.block_size)

    def score(self, view: View[Profile]) -> Tensor:
        zone, memory = view.zone, view.memory
        total = widened(memory.total.view(), zone)
        if zone.covers_all:
            return total
        kinds = self._compositions(memory, zone, total)
        if not memory.choice.numel():
            near = widened(memory.near.view(), zone)
            held = [(total * kept).sum(-1) for kept in kinds[:3]]
            held.append(torch.where(kinds[2], total, near).sum(-1))  # local is what was so for each query
            enough = torch.stack(held) >= self.mass * total.sum(-1)
            memory.choice = torch.cat((enough, torch.ones_like(enough[:1]))).to(torch.uint8).argmax(0)
        every = torch.stack((*kinds, torch.ones_like(kinds[0])))
        kept = every.gather(0, memory.choice[None, ..., None].expand(-1, -1, -1, zone.blocks))[0]
        return total.masked_fill(~kept, -torch.inf)

    def _compositions(self, memory: Profile, zone: Zone, total: Tensor) -> list[Tensor]:
        """Return which blocks the compositions have, each with those before it, bool [B, Hs, N]."""
        size, places = memory.block_size, torch.arange(zone.blocks, device=total.device)
        kept = ((places < zone.sinks) | (places >= zone.first_recent)).expand_as(total)
        found = []
        for marks in (memory.special, memory.punctuation):
            counts = widened(marks.counts().to(total.device), zone)
            tokens = counts.sum(-1, keepdim=True)
            kept = kept | (_most(counts, (tokens / size).ceil()) & (counts > 0))
            found.append(kept)
        found.append(kept | _most(total, math.ceil(self.frequent * zone.length / size - 1e-9)))
        found.append(found[2] | (places >= first_local(zone.length, self.local) // size))
        return found
