"""Traces that a test can learn from."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from attnpred.predictor.traces import TraceMeta, TraceWriter
from attnpred.shapes import num_blocks


def causal(rows: Tensor, first: int, block_size: int) -> Tensor:
    """Return `rows` [..., T, N] with zeros where a block begins after the query."""
    last_block = torch.arange(first, first + rows.shape[-2]) // block_size
    return rows * (torch.arange(rows.shape[-1])[None] <= last_block[:, None])


@pytest.fixture
def persistent(tmp_path: Path) -> Callable[..., Path]:
    """Return a function that writes documents where each head keeps looking at its own few blocks, among noise."""

    def write(documents: int = 5, seed: int = 0, layers: int = 2, heads: int = 2, steps: int = 40) -> Path:
        folder, block_size, first = tmp_path / f"traces-{documents}-{seed}", 4, 160
        generator = torch.Generator().manual_seed(seed)
        blocks = num_blocks(first + steps, block_size)
        writer = TraceWriter(folder, TraceMeta("toy", "toy/2/2", block_size, layers, heads, steps, "a test"))
        for number in range(documents):
            focus = torch.zeros(layers, heads, 1, blocks)
            places = torch.rand(layers, heads, 1, blocks, generator=generator).topk(4).indices
            focus.scatter_(-1, places, 0.5)
            awake = torch.rand(layers, heads, steps, 1, generator=generator) < 0.8
            rows = focus * awake + 0.3 * torch.rand(layers, heads, steps, blocks, generator=generator) ** 4
            writer.add(f"document {number}", causal(rows, first, block_size), first)
        return folder

    return write
