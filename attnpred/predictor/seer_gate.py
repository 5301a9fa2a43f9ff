"""SeerAttention-R's gate (arXiv 2506.08889, section 2; arXiv 2410.13276): which blocks a kv head will want, from its keys.

A block's keys are pooled over its tokens, each channel by its largest value, its smallest value and its mean, side by side;
one projection per kv head makes them the block's gate key, of r numbers. The query heads of a group, side by side, are
projected to one gate query. The gate is softmax over blocks of (gate query . gate key) / sqrt(r).

A gate key is computed once, when its block is full, and stays in fast memory (`GateKeys`): the only thing that a step reads
of a block to choose. The open block is always attended, as the paper has it.

Two things are not as published. The paper pools keys that are not rotated, and rotates gate queries and gate keys itself, by
the query's position and by that of a block's first token. A cache holds rotated keys, and so do traces: they are pooled as
they are, and not rotated again (Quest's bounds and our digests do the same). And there are no norms on the gate vectors.
"""

import math
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor, nn

from attnpred.errors import PredictorError
from attnpred.predictor.block_summary import BlockSummary

POOLS = 3
"""Numbers per channel of a block: largest, smallest, mean."""


def pooled(blocks: Tensor) -> Tensor:
    """Return [..., POOLS * D] of blocks of keys [..., P, D], in fp32."""
    keys = blocks.float()
    return torch.cat((keys.amax(-2), keys.amin(-2), keys.mean(-2)), -1)


def joined(query: Tensor, kv_heads: int) -> Tensor:
    """Return the queries of each group side by side, [B, Hkv, G * D], of query heads [B, Hq, D], in fp32."""
    return query.float().unflatten(1, (kv_heads, -1)).flatten(2)


@dataclass(frozen=True, slots=True)
class GateMap:
    """The projections of one layer: queries [Hkv, G * D, r], keys [Hkv, POOLS * D, r], or [1, ...] where heads share one."""

    queries: Tensor
    keys: Tensor

    def logits(self, query: Tensor, keys: Tensor) -> Tensor:
        """Return [..., Hkv, M, N] for joined queries [..., Hkv, M, G * D] and gate keys [..., Hkv, N, r]."""
        return (query @ self.queries) @ keys.transpose(-1, -2) / math.sqrt(keys.shape[-1])

    def require(self, heads: int, group: int, dim: int) -> None:
        """Raise `PredictorError` unless it is for so many kv heads, queries of each, and dimensions."""
        own, wide = self.queries.shape[0], (self.queries.shape[1], self.keys.shape[1])
        if own not in (1, heads) or wide != (group * dim, POOLS * dim):
            raise PredictorError(
                f"got {heads} kv heads with {group} queries of {dim}, expected {'any number of' if own == 1 else own} with "
                f"{wide[0] * POOLS // wide[1]} of {wide[1] // POOLS}: the gate was trained for another model"
            )


@final
class GateKeys(BlockSummary):
    """Gate keys of one layer; `estimate` is the logarithm of the gate, the same for all query heads of a kv head."""

    def __init__(self, block_size: int, gate: GateMap) -> None:
        super().__init__(block_size)
        self.gate = gate

    def summary(self, blocks: Tensor) -> Tensor:
        heads, dim = blocks.shape[1], blocks.shape[4]
        if self.gate.keys.device != blocks.device:
            self.gate = GateMap(self.gate.queries.to(blocks.device), self.gate.keys.to(blocks.device))
        self.gate.require(heads, self.gate.queries.shape[1] // dim, dim)
        return pooled(blocks) @ self.gate.keys

    def shares(self, query: Tensor, scale: float, selecting: int) -> Tensor:
        table = self.table.view().float()
        heads = table.shape[1]
        self.gate.require(heads, query.shape[1] // heads, query.shape[2])
        logits = self.gate.logits(joined(query, heads)[:, :, None], table)[:, :, 0]
        return torch.log_softmax(logits, -1).repeat_interleave(selecting // heads, 1)


@final
class SeerGate(nn.Module):
    """The projections of all layers, in half precision: queries [layers, Hkv, G * D, r], keys [layers, Hkv, POOLS * D, r].

    layers, heads: of the model it was trained for, or 1 and 1 where all share one. Untrained, a gate key is the first r
    channels of the mean key, and a gate query those of the sum of the queries.
    """

    def __init__(self, layers: int, heads: int, group: int, head_dim: int, rank: int) -> None:
        super().__init__()
        channels = torch.eye(head_dim, rank, dtype=torch.float16, device="cpu")
        means = channels.new_zeros(POOLS * head_dim, rank)
        means[-head_dim:] = channels
        self.queries = nn.Parameter(channels.repeat(layers, heads, group, 1))
        self.keys = nn.Parameter(means.repeat(layers, heads, 1, 1))

    def gate_map(self, layer: int) -> GateMap:
        """Return the projections of the model's `layer`-th attention layer."""
        return GateMap(self.queries[layer].detach().float(), self.keys[layer].detach().float())
