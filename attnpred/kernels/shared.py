"""Attention of a layer that keeps its own keys for near tokens only, and takes those of distant ones from a lower layer.

PoD (arXiv 2412.02252, section 2.2). For the query at position p the near tokens are the first n_s of its row and the last
n_r up to itself, the distant ones all between. Query and values are the layer's own; keys are its own for near tokens,
and for distant ones those of the lowest layer of its group. The two parts are merged by their log-sum-exps,

    g = sum exp a_near / (sum exp a_near + sum exp a_distant),    o = g * o_near + (1 - g) * o_distant,

which is one softmax over both. The gate skips the distant part where `estimate`, the log-sum-exp of the distant part in
the group's lowest layer for the same token and query head, says g >= tau for every query head of a kv head: then o is
o_near. (The paper says only that g is evaluated first; the estimate is ours.)

A prompt is taken in chunks of queries, so that a near window costs what it holds. `shared_reference` is the definition.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from attnpred.kernels import decoding
from attnpred.kernels.dense import AttentionTerms
from attnpred.kernels.streamed import _attend

CHUNK = 256
"""Queries that are taken at once."""


class Part(NamedTuple):
    """Keys [B, Hkv, T, D] of successive tokens from `start` on."""

    start: int
    keys: Tensor


@dataclass(frozen=True, slots=True)
class Split:
    """Which tokens are near: n_s `sinks` and n_r `recent`; first [B]: where each row begins (left padding), None: at 0."""

    sinks: int
    recent: int
    first: Tensor | None = None

    def begins(self) -> tuple[int, int]:
        """Return where the rows begin, the earliest and the latest of them."""
        return (0, 0) if self.first is None else (int(self.first.min()), int(self.first.max()))

    def near(self, queries: Tensor, tokens: Tensor) -> Tensor:
        """Return [B or 1, Q, T], True where a token is near; positions [Q] and [T]."""
        stop = self.sinks if self.first is None else (self.first + self.sinks)[:, None, None]
        ages = (queries[:, None] - tokens)[None]
        return (ages >= 0) & ((ages < self.recent) | (tokens < stop))

    def distant(self, queries: Tensor, tokens: Tensor) -> Tensor:
        """Return [B or 1, Q, T], True where a token is distant."""
        stop = self.sinks if self.first is None else (self.first + self.sinks)[:, None, None]
        return ((queries[:, None] - tokens)[None] >= self.recent) & (tokens >= stop)


class Shared(NamedTuple):
    """output [B, Hq, Q, Dv]; log-sum-exps [B, Hq, Q] of both parts, -inf for one that is empty or was skipped.

    kept [B, Hkv, Q]: whose distant part was attended to; asked: for how many of them there is one.
    """

    output: Tensor
    near: Tensor
    distant: Tensor
    kept: Tensor
    asked: int


def shared_attention(
    query: Tensor,
    own: Sequence[Part],
    distant: Tensor,
    values: Tensor,
    length: int,
    split: Split,
    terms: AttentionTerms,
    mask: Tensor | None = None,
    estimate: Tensor | None = None,
    tau: float | None = None,
) -> Shared:
    """Attend with the last Q of `length` tokens, causally: query [B, Hq, Q, D].

    own: the layer's keys, at least of every token that is near to one of the queries; distant [B, Hkv, >= L, D]: those of
    the lower layer; values [B, Hkv, >= L, Dv]; mask [B or 1, Q, L], True where allowed; estimate [B, Hq, Q].
    """
    found = []
    for rows in (slice(a, min(a + CHUNK, query.shape[2])) for a in range(0, query.shape[2], CHUNK)):
        shown = None if mask is None else mask[:, rows]
        guess = None if estimate is None or tau is None else (estimate[:, :, rows], tau)
        first = length - query.shape[2] + rows.start
        found.append(_chunk(query[:, :, rows], first, own, distant, values, split, terms, shown, guess))
    output, near, far, kept = (torch.cat([one[i] for one in found], 2) for i in range(4))  # type: ignore[misc]
    if terms.sinks is not None:
        total, extra = torch.logaddexp(near, far), terms.sinks.float().view(1, -1, 1)
        output = output * torch.exp(total - torch.logaddexp(total, extra))[..., None]
    return Shared(output.to(query.dtype), near, far, kept, sum(one.asked for one in found))


def _chunk(
    query: Tensor, first: int, own: Sequence[Part], distant: Tensor, values: Tensor, split: Split,
    terms: AttentionTerms, mask: Tensor | None, guess: tuple[Tensor, float] | None,
) -> Shared:  # fmt: skip
    """Attend with successive queries, the first at position `first`; mask [B or 1, Q, >= first + Q]."""
    batch, queries = query.shape[0], query.shape[2]
    groups, last = values.shape[1], first + queries - 1
    earliest, latest = split.begins()
    places = torch.arange(first, last + 1, device=query.device)
    sinks = min(latest + split.sinks, last + 1)
    begin, stop = earliest + split.sinks, last - split.recent + 1
    simple = queries == 1 and mask is None and split.first is None

    def piece(keys: Tensor, start: int, end: int, *, is_near: bool) -> _Piece:
        if simple:
            return _Piece(keys, values[:, :, start:end], None)
        tokens = torch.arange(start, end, device=query.device)
        allowed = split.near(places, tokens) if is_near else split.distant(places, tokens)
        return _Piece(keys, values[:, :, start:end], allowed if mask is None else allowed & mask[:, :, start:end])

    pieces = []
    for low, high in ((0, sinks), (max(sinks, first - split.recent + 1), last + 1)):
        for part in own:
            start, end = max(low, part.start), min(high, part.start + part.keys.shape[2])
            if start < end:
                keys = part.keys[:, :, start - part.start : end - part.start]
                pieces.append(piece(keys, start, end, is_near=True))
    output, near = _attend_to(query, pieces, terms)
    kept = torch.zeros(batch, groups, queries, dtype=torch.bool, device=query.device)
    far = torch.full_like(near, -torch.inf)
    if begin >= stop:
        return Shared(output, near, far, kept, 0)
    starts = torch.zeros(1, device=query.device, dtype=torch.float32) if split.first is None else split.first
    has_distant = (places[None] - split.recent >= starts[:, None] + split.sinks)[:, None]
    kept |= has_distant
    asked = int(kept.sum())
    if guess is not None:
        estimate, tau = guess
        is_enough = torch.sigmoid(near - estimate) >= tau
        kept &= ~is_enough.unflatten(1, (groups, -1)).all(2)
    whole = piece(distant[:, :, begin:stop], begin, stop, is_near=False)
    output, far = _merge_distant(query, output, near, whole, kept, terms)
    return Shared(output, near, far, kept, asked)


class _Piece(NamedTuple):
    """Successive tokens: keys, values [B, Hkv, T, D]; allowed [B or 1, Q, T] or None."""

    keys: Tensor
    values: Tensor
    allowed: Tensor | None


def _merge_distant(
    query: Tensor, output: Tensor, near: Tensor, piece: _Piece, kept: Tensor, terms: AttentionTerms
) -> tuple[Tensor, Tensor]:
    """Return output and log-sum-exp [B, Hq, Q] with the distant part of those `kept` [B, Hkv, Q]; -inf for the others."""
    far = torch.full_like(near, -torch.inf)
    if not bool(kept.any()):
        return output, far
    keys, values, allowed = piece
    group = query.shape[1] // kept.shape[1]
    added = torch.zeros_like(output, dtype=torch.float32)
    if bool(kept.any(2).all()) and bool((kept.flatten(0, 1) == kept[0, 0]).all()):  # the same queries of every head
        rows = kept[0, 0].nonzero()[:, 0]
        some = _Piece(keys, values, None if allowed is None else allowed[:, rows])
        found, normaliser = _attend_to(query[:, :, rows], [some], terms)
        added[:, :, rows], far[:, :, rows] = found.float(), normaliser
    else:
        for b, h in kept.any(2).nonzero().tolist():
            rows, heads = kept[b, h].nonzero()[:, 0], slice(h * group, (h + 1) * group)
            shown = None if allowed is None else allowed[min(b, allowed.shape[0] - 1)][None, rows]
            some = _Piece(keys[b : b + 1, h : h + 1], values[b : b + 1, h : h + 1], shown)
            found, normaliser = _attend_to(query[b : b + 1, heads, rows], [some], terms)
            added[b, heads, rows], far[b, heads, rows] = found[0].float(), normaliser[0]
    return _merged(output, near, added, far)[0], far


def _merged(a: Tensor, one: Tensor, b: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
    """Return the attention over two sets of tokens, and its log-sum-exp, from those of each."""
    total = torch.logaddexp(one, other)
    finite = total.masked_fill(total == -torch.inf, 0.0)  # a query may have seen nothing
    return a.float() * torch.exp(one - finite)[..., None] + b.float() * torch.exp(other - finite)[..., None], total


def _attend_to(query: Tensor, pieces: Sequence[_Piece], terms: AttentionTerms) -> tuple[Tensor, Tensor]:
    """Return the attention over all pieces, [B, Hq, Q, Dv], and its log-sum-exp [B, Hq, Q]."""
    if query.shape[2] == 1 and all(decoding.numba_serves(query, one.keys, one.values) for one in pieces):
        from attnpred.kernels import numba_decode  # numba is loaded when it is used, not before

        parts = [
            numba_decode.dense_parts(
                query[:, :, 0], keys, values, decoding.PIECE, terms.scale, terms.softcap,
                None if allowed is None else allowed[:, 0],
            )
            for keys, values, allowed in pieces
        ]  # fmt: skip
        output, normaliser = numba_decode.merged(parts, query.shape[0], query.shape[1])
        return output[:, :, None], normaliser[:, :, None]
    found: tuple[Tensor, Tensor] | None = None
    for keys, values, allowed in pieces:
        one = _attend(query, keys, values, terms, allowed)
        found = one if found is None else _merged(*found, *one)
    assert found is not None
    return found
