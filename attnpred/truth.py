"""What a step would attend to if it attended to everything: reads all keys. For calibration, the oracle, evaluation."""

from torch import Tensor

from attnpred.kernels.dense import AttentionTerms
from attnpred.kernels.streamed import StreamedRows
from attnpred.store.base import Store
from attnpred.telemetry import LayerCounts


def true_rows(query: Tensor, store: Store, terms: AttentionTerms, mask: Tensor | None, *, total: bool) -> StreamedRows:
    """Return the probabilities of `query` [B, Hq, D] per block: the largest one of a block, or (`total`) their sum.

    mask [B, L], True where attended, or None.
    """
    every = None if mask is None else mask[:, None]
    rows = StreamedRows(query[:, :, None], store.length, terms, every, block_size=store.block_size, total=total)
    for piece in store.pieces():
        rows.add(piece.start, piece.keys)
    return rows


def true_mass(query: Tensor, store: Store, terms: AttentionTerms, mask: Tensor | None) -> Tensor:
    """Return the probability mass that `query` [B, Hq, D] puts on each block, [B, Hq, N]."""
    return true_rows(query, store, terms, mask, total=True).result()[:, :, 0]


def count_recovery(counts: LayerCounts, mass: Tensor, selection: Tensor, blocks: int) -> None:
    """Count how much of `mass` [B, Hq, N] lies in `selection` [B, Hs, K], and in the best selection of `blocks` blocks."""
    grouped = mass.unflatten(1, (selection.shape[1], -1))
    inside = selection.clamp_min(0)[:, :, None].expand(-1, -1, grouped.shape[2], -1)
    kept = (grouped.gather(3, inside) * (selection >= 0)[:, :, None]).sum(3)
    top = grouped.sum(2).topk(min(blocks, grouped.shape[3]), -1).indices
    best = grouped.gather(3, top[:, :, None].expand(-1, -1, grouped.shape[2], -1)).sum(3)
    counts.count_recovery(kept, best)
