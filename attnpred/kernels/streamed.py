"""Attention over everything, in pieces: all keys and values are seen once, in order, and need never lie side by side.

Each piece gives an output and a log-sum-exp, and two pieces are merged by their log-sum-exps (online softmax, Milakov and
Gimelshein, arXiv 1805.02867). A store hands out its pieces (`attnpred.store`), a prompt is one piece of its own.

`StreamedAttention` is the attention (for one query it is numba's kernel, where that is there: its items are the pieces).
`StreamedRows` are history rows of the same pass: a block's largest probability is its largest logit less the log-sum-exp
over all pieces, so it is known once the last piece was seen. `StreamedMeans` are the mean keys of the same pass.

Pieces begin on a block, and a piece gives the same bits wherever its keys came from.
"""

from typing import Any, final

import torch
from torch import Tensor

from attnpred.kernels import decoding
from attnpred.kernels.dense import AttentionTerms, masked_logits, pool_heads
from attnpred.shapes import num_blocks

CHUNK_ELEMENTS = 1 << 24
"""Logits that are held at once."""


class Streamed:
    """What both share: query [B, Hq, Q, D]; mask [B, Q, L], True where allowed, or None: the last Q of L, causal."""

    def __init__(self, query: Tensor, length: int, terms: AttentionTerms, mask: Tensor | None) -> None:
        self.query, self.length, self.terms, self.mask = query, length, terms, mask

    def allowed(self, start: int, stop: int) -> Tensor | None:
        """Return the mask [B or 1, Q, stop - start] of a piece; None if all of it is allowed."""
        queries = self.query.shape[2]
        if self.mask is not None:
            piece = self.mask[:, :, start:stop]
            return None if bool(piece.all()) else piece
        first = self.length - queries  # position of the first query
        if stop <= first + 1:
            return None
        places = torch.arange(start, stop, device=self.query.device)
        return (places <= torch.arange(first, self.length, device=self.query.device)[:, None])[None]


@final
class StreamedAttention(Streamed):
    """Feed it every piece with `add`; then `result` is the attention.

    piece: tokens of a piece, in sixteens; what `add` gets may be several of them, if there is one query.
    """

    def __init__(
        self, query: Tensor, length: int, terms: AttentionTerms, mask: Tensor | None, piece: int = decoding.PIECE
    ) -> None:
        super().__init__(query, length, terms, mask)
        self.piece = piece
        self.output: Tensor | None = None
        self.normaliser = torch.empty(0, dtype=torch.float32, device="cpu")
        self.parts: list[Any] = []  # of numba's kernel, for one query

    def add(self, start: int, keys: Tensor, values: Tensor) -> None:
        """Take in the piece that begins with token `start`: keys [B, Hkv, T, D], values [B, Hkv, T, Dv]."""
        if self.query.shape[2] == 1 and decoding.numba_serves(self.query, keys, values):
            from attnpred.kernels import numba_decode  # numba is loaded when it is used, not before

            shown = None if self.mask is None else self.mask[:, 0, start : start + keys.shape[2]]
            one, scale, softcap = self.query[:, :, 0], self.terms.scale, self.terms.softcap
            self.parts.append(numba_decode.dense_parts(one, keys, values, self.piece, scale, softcap, shown))
            return
        allowed = self.allowed(start, start + keys.shape[2])
        output, normaliser = _attend(self.query, keys, values, self.terms, allowed)
        if self.output is None:
            self.output, self.normaliser = output, normaliser
            return
        total = torch.logaddexp(self.normaliser, normaliser)
        finite = total.masked_fill(total == -torch.inf, 0.0)  # a query may have seen nothing yet
        old, new = torch.exp(self.normaliser - finite)[..., None], torch.exp(normaliser - finite)[..., None]
        self.output = self.output.float().mul_(old).add_(output * new)
        self.normaliser = total

    def result(self) -> Tensor:
        """Return [B, Hq, Q, Dv] in the dtype of the query."""
        if self.parts:
            from attnpred.kernels import numba_decode

            batch, heads = self.query.shape[0], self.query.shape[1]
            output, _ = numba_decode.merged(self.parts, batch, heads, self.terms.sinks)
            return output[:, :, None].to(self.query.dtype)
        assert self.output is not None
        if self.terms.sinks is not None:
            extra = self.terms.sinks.float().view(1, -1, 1)
            self.output = self.output * torch.exp(self.normaliser - torch.logaddexp(self.normaliser, extra))[..., None]
        return self.output.to(self.query.dtype)


@final
class StreamedMeans:
    """Feed it the keys of every piece with `add`; then `result` are the means of all full blocks, [B, Hkv, N, D], fp32."""

    def __init__(self, block_size: int) -> None:
        self.block_size, self.parts = block_size, list[Tensor]()

    def add(self, start: int, keys: Tensor) -> None:
        """Take in the keys of a piece, [B, Hkv, T, D]."""
        tokens = keys.shape[2] // self.block_size * self.block_size
        if tokens:
            self.parts.append(keys[:, :, :tokens].float().unflatten(2, (-1, self.block_size)).mean(3))

    def result(self) -> Tensor:
        """Return the means; there is at least one full block."""
        return torch.cat(self.parts, 2)


@final
class StreamedRows(Streamed):
    """Feed it the keys of every piece with `add`; then `result` are rows: per block the maximum, or the sum if `total`."""

    def __init__(
        self,
        query: Tensor,
        length: int,
        terms: AttentionTerms,
        mask: Tensor | None,
        *,
        block_size: int,
        total: bool = False,
    ) -> None:
        super().__init__(query, length, terms, mask)
        self.block_size, self.total = block_size, total
        batch, heads, queries, _ = query.shape
        # Of each block the largest logit or the log-sum-exp; made here, because it is the most that a long context needs.
        self.shown = query.new_empty(batch, heads, queries, num_blocks(length, block_size), dtype=torch.float32)
        self.normaliser = query.new_full((batch, heads, queries), -torch.inf, dtype=torch.float32)

    def add(self, start: int, keys: Tensor) -> None:
        """Take in the keys of a piece, [B, Hkv, T, D]."""
        allowed = self.allowed(start, start + keys.shape[2])
        first, count = start // self.block_size, num_blocks(keys.shape[2], self.block_size)
        for rows in _row_chunks(self.query, keys.shape[2]):
            logits = masked_logits(self.query[:, :, rows], keys, self.terms, _rows_of(allowed, rows))
            missing = count * self.block_size - logits.shape[-1]
            if missing:
                logits = torch.nn.functional.pad(logits, (0, missing), value=-torch.inf)
            pieces = logits.unflatten(-1, (count, self.block_size))
            shown = pieces.logsumexp(-1) if self.total else pieces.amax(-1)
            self.shown[:, :, rows, first : first + count] = shown
            # Over a piece at once where blocks need no sums: a reduction of sixteen takes twice as long.
            normaliser = (shown if self.total else logits).logsumexp(-1)
            self.normaliser[:, :, rows] = torch.logaddexp(self.normaliser[:, :, rows], normaliser)

    def result(self, selecting: int | None = None) -> Tensor:
        """Return [B, Hs, Q, N], the maximum over the query heads that select together; without `selecting` [B, Hq, Q, N]."""
        normaliser = self.normaliser
        if self.terms.sinks is not None:
            normaliser = torch.logaddexp(normaliser, self.terms.sinks.float().view(1, -1, 1))
        finite = normaliser.masked_fill(normaliser == -torch.inf, 0.0)  # a query that may attend to nothing
        rows = self.shown.sub_(finite[..., None]).exp_()
        return rows if selecting is None else pool_heads(rows, selecting)


def _row_chunks(query: Tensor, length: int) -> list[slice]:
    batch, heads, queries, _ = query.shape
    step = max(1, CHUNK_ELEMENTS // (batch * heads * length))
    return [slice(start, start + step) for start in range(0, queries, step)]


def _rows_of(mask: Tensor | None, rows: slice) -> Tensor | None:
    return None if mask is None else mask[:, rows]


def _attend(
    query: Tensor, keys: Tensor, values: Tensor, terms: AttentionTerms, allowed: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return the attention [B, Hq, Q, Dv] within a piece, and its log-sum-exp [B, Hq, Q]; -inf if nothing is allowed."""
    fused = query.device.type == "cpu" and terms.softcap is None and query.shape[3] == values.shape[3]
    parts = [
        (_fused if fused else _explicit)(query[:, :, rows], keys, values, terms, _rows_of(allowed, rows))
        for rows in _row_chunks(query, keys.shape[2])
    ]
    if len(parts) == 1:
        return parts[0]
    outputs, normalisers = zip(*parts, strict=True)
    return torch.cat(outputs, 2), torch.cat(normalisers, 2)


def _fused(
    query: Tensor, keys: Tensor, values: Tensor, terms: AttentionTerms, allowed: Tensor | None
) -> tuple[Tensor, Tensor]:
    """torch's fused CPU attention, which also gives the log-sum-exp; the queries of a group lie side by side as rows."""
    batch, heads, queries, dim = query.shape
    kv_heads = keys.shape[1]
    group = heads // kv_heads
    packed = query.reshape(batch, kv_heads, group * queries, dim)
    bias = None
    if allowed is not None:
        bias = torch.zeros(allowed.shape, dtype=query.dtype, device=allowed.device).masked_fill_(~allowed, -torch.inf)
        bias = bias[:, None].repeat(1, 1, group, 1)
    output, normaliser = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        packed, keys, values, 0.0, False, attn_mask=bias, scale=terms.scale
    )
    normaliser = normaliser.reshape(batch, heads, queries)
    if allowed is not None:  # torch says 0 for a query that may attend to nothing
        normaliser = normaliser.masked_fill(~allowed.any(-1)[:, None], -torch.inf)
    return output.reshape(batch, heads, queries, -1), normaliser


def _explicit(
    query: Tensor, keys: Tensor, values: Tensor, terms: AttentionTerms, allowed: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The same written out, in fp32: any device, and logits with a softcap."""
    logits = masked_logits(query, keys, terms, allowed)
    normaliser = logits.logsumexp(-1)
    weights = torch.exp(logits - normaliser.masked_fill(normaliser == -torch.inf, 0.0)[..., None])
    grouped = weights.flatten(1, 2).unflatten(1, (keys.shape[1], -1))
    output = (grouped @ values.float()).view(*query.shape[:3], -1)
    return output, normaliser
