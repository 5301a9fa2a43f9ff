"""What the Triton kernels share: sizes filled up to powers of two, and how work is cut so that it fills a GPU."""

import functools

import torch
import triton

TILE_BYTES = 16_384
"""Of keys read at once: keys and values, twice for the loads under way, stay below what any GPU since 2020 shares out."""
MOST_SPLITS, PROGRAMS_PER_PROCESSOR = 64, 4


@triton.jit
def _nothing():
    """Show what `triton.jit` makes."""


def interpreted() -> bool:
    """True where Triton's interpreter runs the kernels, which TRITON_INTERPRET=1 decides when triton is imported."""
    return not isinstance(_nothing, triton.JITFunction)


def room(size: int, least: int = 1) -> int:
    """Return the power of two that `size` is filled up to; matrix units want at least 16."""
    return max(least, int(triton.next_power_of_2(size)))


def ceil_div(size: int, by: int) -> int:
    """Return how many times `by` covers `size`."""
    return -(-size // by)


@functools.cache
def processors(device: torch.device) -> int:
    """Return how many programs `device` runs side by side."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


def cut(rows: int, chosen: int, block_size: int, width: int, device: torch.device) -> tuple[int, int, int, int]:
    """Return how many blocks a tile has, how many tokens of each, how many parts there are, and how many blocks of each.

    rows: selecting heads; width: the bytes of one token's key or value, filled up. A part has whole tiles.
    """
    tokens = min(128, max(16, TILE_BYTES // width))
    while tokens > 32 and rows * ceil_div(chosen * room(block_size), tokens) < processors(device):
        tokens //= 2
    per_block = min(room(block_size), tokens)
    blocks = tokens // per_block
    tiles = max(1, ceil_div(chosen, blocks))
    splits = min(tiles, MOST_SPLITS, ceil_div(PROGRAMS_PER_PROCESSOR * processors(device), max(1, rows)))
    per_split = ceil_div(tiles, splits) * blocks
    return blocks, per_block, max(1, ceil_div(chosen, per_split)), per_split
