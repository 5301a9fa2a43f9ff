"""One layer that decodes random keys and queries, for tests of policies: what was attended, and what came out."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from attnpred.config import CacheConfig
from attnpred.decode import LayerDecoder
from attnpred.kernels.dense import AttentionTerms
from attnpred.policies import POLICIES
from attnpred.policies.base import Policy
from attnpred.store.pool import BlockPool
from attnpred.telemetry import LayerCounts

P, KV_HEADS, HEADS, DIM = 4, 2, 4, 8
GROUP = HEADS // KV_HEADS
SCALE = 0.5
CONFIG = CacheConfig(
    budget=12 * P, block_size=P, num_sink_tokens=P, recent_window=2 * P, history=6, calibration_interval=0
)


def make(name: str) -> Policy[Any]:
    """Return the policy of that name with its defaults, and weights that were never trained."""
    torch.manual_seed(0)
    return POLICIES[name].untrained(P, GROUP, DIM)


@dataclass
class Text:
    """Queries [B, Hq, T, D] and keys [B, Hkv, T, D]; values are others. Sharp enough that blocks differ."""

    tokens: int
    batch: int = 1
    seed: int = 0
    queries: Tensor = field(init=False)
    keys: Tensor = field(init=False)
    values: Tensor = field(init=False)

    def __post_init__(self) -> None:
        generator = torch.Generator().manual_seed(self.seed)
        self.queries = torch.randn(self.batch, HEADS, self.tokens, DIM, generator=generator)
        self.keys = torch.randn(self.batch, KV_HEADS, self.tokens, DIM, generator=generator)
        self.values = torch.randn(self.batch, KV_HEADS, self.tokens, DIM, generator=generator)


class Layer:
    """A decoder, the pool it reads, and what it has done: per step the output [B, Hq, D] and the blocks [B, Hkv, K]."""

    def __init__(self, policy: Policy[Any], config: CacheConfig = CONFIG, layer: int = 0, leader: Any = None) -> None:
        self.decoder = LayerDecoder(config, policy, LayerCounts(), layer, leader)
        self.pool = BlockPool(config.block_size)
        self.outputs: list[Tensor] = []
        self.blocks: list[Tensor] = []

    def prompt(self, text: Text, tokens: int) -> "Layer":
        """Take in the first `tokens` tokens as a prompt."""
        self.pool.append(text.keys[:, :, :tokens], text.values[:, :, :tokens])
        self.decoder.observe(text.queries[:, :, :tokens], self.pool, AttentionTerms(SCALE), None, prompt=True)
        return self

    def step(self, text: Text, t: int, mask: Tensor | None = None) -> "Layer":
        """Decode token `t`."""
        self.pool.append(text.keys[:, :, t : t + 1], text.values[:, :, t : t + 1])
        self.outputs.append(self.decoder.step(text.queries[:, :, t], self.pool, AttentionTerms(SCALE), mask))
        assert self.decoder.attended is not None
        self.blocks.append(self.decoder.attended[1])
        return self

    def steps(self, text: Text, first: int, last: int) -> "Layer":
        """Decode tokens `first` to `last`."""
        for t in range(first, last):
            self.step(text, t)
        return self


def chosen(selection: Tensor) -> list[set[int]]:
    """Return the blocks of each head of the first row, without -1."""
    return [set(ids) - {-1} for ids in selection[0].tolist()]


def kept(length: int, config: CacheConfig = CONFIG) -> set[int]:
    """Return the blocks that are attended whatever the policy says."""
    size = config.block_size
    recent = {token // size for token in range(length - config.recent_window, length)}
    return set(range(config.num_sink_tokens // size)) | recent


def best(scores: list[float], length: int, config: CacheConfig = CONFIG) -> set[int]:
    """Return the selection that `scores` of all blocks lead to, sorted in a loop."""
    size, edges = config.block_size, kept(length, config)
    free = config.budget_blocks(length) - config.num_sink_tokens // size - (config.recent_window // size + 1)
    middle = [block for block in range(-(-length // size)) if block not in edges]
    return edges | set(sorted(middle, key=lambda block: -scores[block])[:free])
