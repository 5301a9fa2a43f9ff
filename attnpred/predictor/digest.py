"""`Digest`: a small summary of every sealed block's keys, kept in fast memory and scored with a query.

A block keeps the mean of its keys in r directions (`attnpred.predictor.directions`), in 4 bits each
(`attnpred.kernels.digest`), so it takes r / 2 bytes. The directions are found with the keys that are sealed first, a
prompt's, and with the queries that were met before them; later keys are coded in the same ones. A call of several tokens
attends to everything: a question about a text, or the next chunk of it. What it asks for lies in other directions, so they
are found anew then, and all blocks coded again (`renew`). The estimate of a block's attention is a softmax of the logits of
all means.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple, final

import torch
from torch import Tensor

from attnpred import kernels
from attnpred.kernels.digest import pack, unpack
from attnpred.predictor.directions import Spread, key_directions, rank_for
from attnpred.predictor.memory import Columns, Memory

TURN = 8
"""Tokens of a call from which on it is worth new directions; fewer say too little of what comes after them."""


class Asked(NamedTuple):
    """What an estimate is to be computed for: query [B, Hq, D], the scale of its logits, Hs, and sealed blocks."""

    query: Tensor
    scale: float
    selecting: int
    blocks: int


@final
class Digest(Memory):
    """Codes of one layer, and the estimates for the query that was looked at last."""

    remembers: ClassVar[tuple[str, ...]] = (
        "_sealed",
        "estimate",
        "to_keys",
        "to_queries",
        "centre",
        "spread",
        "counted",
    )

    def __init__(self, block_size: int) -> None:
        self.block_size = block_size
        self.codes = Columns(dtype=torch.int8)
        self.clear()

    def clear(self) -> None:
        super().clear()
        self._sealed = 0
        none = torch.empty(0, dtype=torch.float32, device="cpu")
        self.to_keys = self.to_queries = self.centre = none  # [B, Hkv, D, r] twice, [B, Hkv, 1, D]
        self.spread, self.counted = none, 0  # `Spread` of the queries that the directions are of
        self.met = none
        self._estimate = none
        self._forget_asked()

    def _forget_asked(self) -> None:
        self._asked: Asked | None = None  # what the estimate is to be computed for, until somebody wants it
        self._projections: tuple[float, Tensor] | None = None  # for which scale, and what
        self._prepared: Any = None  # for numba's kernels, while scale and codes are the same

    def tables(self) -> Sequence[Columns]:
        return (self.codes,)

    @property
    def sealed(self) -> int:
        return self._sealed

    def look_bytes(self) -> int:
        return self.bytes()

    @property
    def estimate(self) -> Tensor:
        """[B, Hs, N]: for the query that was looked at last, the logarithm of the attention on each sealed block."""
        if self._asked is not None:
            asked, self._asked = self._asked, None
            self._estimate = self.shares(*asked)
        return self._estimate

    @estimate.setter
    def estimate(self, known: Tensor) -> None:
        self._estimate, self._asked = known, None

    @property
    def is_empty(self) -> bool:
        return (self._estimate.numel() if self._asked is None else self._asked.blocks) == 0

    def meet(self, query: Tensor, scale: float) -> None:
        if not self._sealed or query.shape[2] >= TURN:  # directions are found with them
            self.met = query.detach()

    def seal(self, keys: Tensor) -> None:
        self._settle()
        means = keys.float().unflatten(2, (-1, self.block_size)).mean(3)
        if not self._sealed:
            self._begin(means)
        self._add(means)

    def wants_means(self, queries: int) -> bool:
        return bool(self._sealed) and queries >= TURN

    def renew(self, means: Tensor) -> None:
        self._settle()
        self._begin(means)
        self._sealed = 0
        self._add(means)

    def _add(self, means: Tensor) -> None:
        """Code the means of the blocks that follow."""
        batch, heads, blocks, _ = means.shape
        packed = pack((means - self.centre) @ self.to_keys)
        self.codes.reserve(batch, heads, self._sealed + blocks, means.device)[:, :, self._sealed :] = packed
        self._sealed += blocks

    def _begin(self, means: Tensor) -> None:
        """Find the directions, from the means of all blocks there are and the queries that were met."""
        batch, heads, _, dim = means.shape
        queries = self.met if self.met.numel() else means.new_zeros(batch, heads, 0, dim)
        spread = Spread(self.spread, self.counted).and_new(queries.reshape(batch, heads, -1, dim))
        self.spread, self.counted = spread
        self.centre = means.mean(2, keepdim=True)
        rank = rank_for(dim, self.block_size)
        self.to_keys, self.to_queries = key_directions(spread, means - self.centre, rank)
        self.codes.clear()
        self.codes.after = (rank // 2,)
        self.met = self.met.new_empty(0)
        self._forget_asked()

    def _settle(self) -> None:
        """Compute what was asked for, before the codes change."""
        _ = self.estimate

    def crop(self, columns: int) -> None:
        self._settle()
        self._sealed = min(self._sealed, max(0, columns - 1))
        super().crop(self._sealed)

    def restore(self, state: Mapping[str, Any]) -> None:
        super().restore(state)
        self._forget_asked()

    def select(self, rows: Tensor) -> None:
        self._settle()
        super().select(rows)
        self._change(lambda tensor: tensor[rows.to(tensor.device)])

    def repeat(self, times: int) -> None:
        self._settle()
        super().repeat(times)
        self._change(lambda tensor: tensor.repeat_interleave(times, 0))

    def _change(self, change: Callable[[Tensor], Tensor]) -> None:
        self._map(change)
        self.met = change(self.met) if self.met.numel() else self.met
        self._forget_asked()

    def look(self, query: Tensor, scale: float, selecting: int) -> None:
        """Have `estimate` be that for `query` [B, Hq, D]; it is computed when somebody wants it.

        It is relative to all sealed blocks, and of the heads that select together it is the sum.
        """
        self._asked = Asked(query, scale, selecting, self._sealed)

    def take_asked(self) -> "tuple[Asked, Any] | None":
        """Return what was asked, and the rest of what numba's kernels need to answer.

        None if it was computed already, or is not for them. Who takes it has to set `estimate`.
        """
        asked = self._asked
        if asked is None or asked.blocks == 0 or not kernels.has_native_selection(asked.query):
            return None
        return asked, self.for_numba(asked.scale)

    def codes_for(self, blocks: int) -> Tensor:
        """Have room for the codes of `blocks` blocks, and return the memory of all, the same as long as it lies there."""
        codes = self.codes
        if blocks > codes.data.shape[2]:
            codes.reserve(codes.data.shape[0], codes.data.shape[1], blocks, codes.data.device)
            codes.count = self._sealed
        return codes.data

    def took(self, asked: Asked) -> None:
        """Note that codes of all blocks of `asked` are there, and that it is the latest query."""
        self._sealed = self.codes.count = asked.blocks
        self._asked = asked

    def for_numba(self, scale: float) -> Any:
        """Return what numba's kernels are told of this layer; the same as before while its codes lie where they are."""
        key = (scale, self.codes.data.data_ptr())
        if self._prepared is None or self._prepared.key != key:
            from attnpred.kernels import numba_digest  # numba is loaded when it is used, not before

            batch, heads, dim, _ = self.to_queries.shape
            tables = [(range(heads), 1, self.codes.data)]
            self._prepared = numba_digest.prepare(tables, batch, heads, dim, self._projection(scale), key)
        return self._prepared

    def _projection(self, scale: float) -> Tensor:
        """Return [B, Hkv, D, r], what a query is multiplied with; made once for a model's scale."""
        if self._projections is None or self._projections[0] != scale:
            self._projections = scale, (self.to_queries * scale).contiguous()
        return self._projections[1]

    def _projected(self, query: Tensor, scale: float) -> Tensor:
        """Return [B, Hkv, G, r] of query [B, Hq, D]."""
        batch, heads, _ = query.shape
        kv_heads = self.to_queries.shape[1]
        return query.float().view(batch, kv_heads, heads // kv_heads, -1) @ self._projection(scale)

    def shares(self, query: Tensor, scale: float, selecting: int, blocks: int) -> Tensor:
        """Return `estimate` for `query` [B, Hq, D] and the first `blocks` blocks, without keeping it."""
        if blocks == 0:
            return query.new_empty(query.shape[0], selecting, 0, dtype=torch.float32)
        if kernels.has_native_selection(query):
            from attnpred.kernels import numba_digest  # numba is loaded when it is used, not before

            return numba_digest.look(query, self.for_numba(scale), blocks, selecting)
        projected = self._projected(query, scale)
        batch, kv_heads = projected.shape[:2]
        stored = self.codes.data.flatten(0, 1)[:, :blocks]
        several = selecting // kv_heads  # 1, or G where each query head selects for itself
        parts = projected.flatten(0, 1).chunk(several, 1)
        found = [kernels.digest_shares(part.contiguous(), stored, 1).view(batch, kv_heads, blocks) for part in parts]
        return torch.stack(found, 2).flatten(1, 2)

    def logits(self, query: Tensor, scale: float, blocks: int) -> Tensor:
        """Return the logits [B, Hq, R, blocks] of several queries [B, Hq, R, D], in fp32 throughout."""
        batch, heads, count, dim = query.shape
        kv_heads = self.to_queries.shape[1]
        grouped = query.float().reshape(batch, kv_heads, -1, dim) @ self._projection(scale)
        stored = unpack(self.codes.view()[:, :, :blocks])
        return (grouped @ stored.transpose(-1, -2)).view(batch, heads, count, blocks)
