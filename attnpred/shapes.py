"""The vocabulary of tensor shapes; the same letter means the same thing in every docstring and signature.

    B    batch                       P   block size, tokens (16)
    Hq   query heads                 L   tokens in the cache
    Hkv  key/value heads             N   blocks, ceil(L / P); the last one may be partly filled
    G    Hq // Hkv                   K   selected blocks of one head
    D    head dimension              H   history rows (64)
    Hs   heads that select: Hkv, or Hq with `per_query_head`
    Q    queries of one call (1 in a decode step)

    query      [B, Hq, Q, D]         keys, values  [B, Hkv, L, D] (stored with room to grow)
    row        [B, Hs, N]            block maxima of one query's attention probabilities
    history    [B, Hs, H, N]         rows, oldest first
    selection  [B, Hs, K]            block ids, int64
    scores     [B, Hs, N]            higher is kept

The text of other docstrings uses these letters without saying so again.
"""

from torch import Tensor

from attnpred.errors import ShapeError


def num_blocks(tokens: int, block_size: int) -> int:
    """Return N = ceil(tokens / block_size)."""
    return -(-tokens // block_size)


def expect(name: str, tensor: Tensor, *shape: int) -> None:
    """Raise `ShapeError` unless `tensor` has `shape`; -1 stands for any size."""
    if tensor.ndim != len(shape) or any(w not in (-1, g) for g, w in zip(tensor.shape, shape, strict=False)):
        wanted = ", ".join("any" if size == -1 else str(size) for size in shape)
        raise ShapeError(f"got {name} of shape {tuple(tensor.shape)}, expected [{wanted}]: see attnpred.shapes")
