"""What no program can beat on this machine: how fast memory is read, in one stream and in blocks at random places.

    python -m benchmarks.limits [--mebibytes 512] [--blocks 2048 4096 8192] [--rounds 16]

A dense step is limited by the first, a sparse one by the second: K and V of a block of 16 tokens lie in separate tensors, so
at D = 128 in bf16 it reads pieces of 4 KiB. The loop only adds up 64-bit words, several sums side by side, and asks for the
pieces ahead of it; threads share out the work as the kernels do (`attnpred.kernels.numba_tools`). Without numba it is
torch: a sum for the stream, `index_select` for blocks, which also writes what it reads; `method` says which.

The memory is that of a `BlockPool`, so that its pages are of the kind the library has. It is larger than any cache, and
the blocks are others in every round. Hosts of virtual machines hold their bandwidth back at times: so other benchmarks
take a sample in each of their rounds (`ColdMemory`). The last line is one JSON object.
"""

import argparse
import json
import statistics
import time
from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from attnpred.store.pool import BlockPool
from benchmarks.environment import environment

STREAM_PIECE = 256 << 10
"""Bytes of a stream that a thread takes at once."""


def read_torch(words: Tensor, places: Tensor | None, block_bytes: int) -> None:
    """Read all of `words`, or the blocks at `places`, with torch alone."""
    if places is None:
        words.sum()
    else:
        words.view(-1, block_bytes // 8).index_select(0, places)


class ColdMemory:
    """Memory of the kind that keys and values lie in, and how fast it is read: GB/s of single reads, for interleaving."""

    def __init__(self, size: int = 512 << 20) -> None:
        tokens = size // (8 * 128 * 2)
        keys = torch.zeros(1, 8, tokens, 128, dtype=torch.bfloat16)
        pool = BlockPool(16)
        pool.append(keys, keys[..., :1])
        self.words = pool.keys.view(torch.int64).flatten()[: size // 8]
        self.words.copy_(torch.arange(self.words.numel()))  # every page is there
        self.method, self.read, self.turn = "torch", read_torch, 0
        if find_spec("numba") is not None:
            from benchmarks.numba_sums import read

            self.method, self.read = "numba", read
        self.stream()  # compiles, and wakes the threads
        self.blocks(4096)

    def stream(self, parts: int = 4) -> float:
        """Read the next one of so many parts."""
        self.turn = (self.turn + 1) % parts
        part = self.words.chunk(parts)[self.turn]
        return self._timed(part, None, STREAM_PIECE, part.numel() * 8)

    def blocks(self, block_bytes: int) -> float:
        """Read a sixteenth, in blocks at random places."""
        count = self.words.numel() * 8 // block_bytes
        places = torch.randperm(count)[: max(1, count // 16)]
        return self._timed(self.words, places, block_bytes, places.numel() * block_bytes)

    def _timed(self, words: Tensor, places: Tensor | None, piece: int, size: int) -> float:
        began = time.perf_counter()
        self.read(words, places, piece)
        return size / (time.perf_counter() - began) / 1e9


def summary(memory: ColdMemory, streams: list[float], blocks: dict[int, list[float]]) -> dict[str, Any]:
    """Return what the JSON of a benchmark says of the limits: medians, and the least and most."""
    return {
        "stream_gb_per_s": round(statistics.median(streams), 2),
        "block_gb_per_s": {str(size): round(statistics.median(taken), 2) for size, taken in blocks.items()},
        "spread_gb_per_s": {
            str(name): [round(min(taken), 2), round(max(taken), 2)]
            for name, taken in ({"stream": streams} | blocks).items()
        },
        "method": memory.method,
        "buffer_bytes": memory.words.numel() * 8,
    }


def measure(memory: ColdMemory, sizes: Sequence[int] = (2048, 4096, 8192), rounds: int = 16) -> dict[str, Any]:
    """Return the limits: GB/s in one stream, and for each size of blocks."""
    streams: list[float] = []
    blocks: dict[int, list[float]] = {size: [] for size in sizes}
    for _ in range(rounds):
        streams.append(memory.stream())
        for size, taken in blocks.items():
            taken.append(memory.blocks(size))
    return summary(memory, streams, blocks)


def shown(limits: dict[str, Any]) -> str:
    """Return the limits as a line."""
    parts = ", ".join(f"{speed:.1f} in blocks of {size} B" for size, speed in limits["block_gb_per_s"].items())
    return f"limits ({limits['method']}): {limits['stream_gb_per_s']:.1f} GB/s in one stream, {parts}"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.limits", description=__doc__.partition("\n")[0])
    parser.add_argument("--mebibytes", type=int, default=512)
    parser.add_argument("--blocks", type=int, nargs="+", default=[2048, 4096, 8192])
    parser.add_argument("--rounds", type=int, default=16)
    args = parser.parse_args(arguments)
    found = measure(ColdMemory(args.mebibytes << 20), args.blocks, args.rounds)
    print(shown(found))
    print(json.dumps(found | environment()))


if __name__ == "__main__":
    main()
