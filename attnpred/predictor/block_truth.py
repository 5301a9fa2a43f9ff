"""What a captured document says about its blocks: everything that selection can be trained or measured on.

For each of T queries and every block, the largest logit and the log-sum-exp of the logits inside. Any selection's
attention follows from these without the keys: its normaliser is the log-sum-exp over the chosen blocks, its row the
chosen maxima less that. Here the heads of all layers stand side by side: R = layers * Hkv rows, G query heads each.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from attnpred.predictor.traces import Vectors
from attnpred.shapes import num_blocks


@dataclass(frozen=True, slots=True)
class BlockTruth:
    """largest, total: logits [R, G, T, N]; mass: attention summed over the group, [R, T, N]; first: position of query 0."""

    largest: Tensor
    total: Tensor
    mass: Tensor
    first: int


@torch.no_grad()
def block_truth(document: Vectors, scale: float, block_size: int) -> BlockTruth:
    """Return the truth about `document`; logits of blocks after a query are very low."""
    layers, _, steps, dim = document.queries.shape
    heads, length = document.keys.shape[1], document.keys.shape[2]
    blocks = num_blocks(length, block_size)
    positions = document.first + torch.arange(steps, device="cpu")
    future = torch.arange(blocks * block_size, device="cpu") > positions[:, None]  # also what fills up the last block
    largest, total = [], []
    for layer in range(layers):
        queries = document.queries[layer].float().view(heads, -1, dim)
        keys = torch.nn.functional.pad(document.keys[layer].float(), (0, 0, 0, blocks * block_size - length))
        logits = (queries @ keys.transpose(-1, -2)).mul_(scale).view(heads, -1, steps, blocks * block_size)
        logits.masked_fill_(future, -1e4)
        pieces = logits.unflatten(-1, (blocks, block_size))
        largest.append(pieces.amax(-1))
        total.append(pieces.logsumexp(-1))
    all_total = torch.cat(total)
    mass = torch.softmax(all_total, -1).sum(1)
    return BlockTruth(torch.cat(largest), all_total, mass, document.first)
