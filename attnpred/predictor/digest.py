"""`Digest`: a small summary of every sealed block's keys, kept in fast memory and scored with a query.

A key is centred and projected to r directions (`DigestMap.keys`); a block keeps `vectors` means of successive projected
keys: one mean of all its tokens for most heads, one vector per token for heads that look for single tokens, whose key a
mean would drown. Each vector is stored in 4 bits per direction (`attnpred.kernels.digest`), so a block takes
vectors * r / 2 bytes. The query is projected too (`DigestMap.queries`), and the estimate of a block's attention is the
log-sum-exp of its vectors' logits.

The projections are trained for a model (`attnpred.predictor.digest_training`). Without them every head gets the
plain mean key, each channel in units of its own spread over the first blocks that are sealed.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, final

import torch
from torch import Tensor

from attnpred import kernels
from attnpred.errors import PredictorError
from attnpred.kernels.digest import pack
from attnpred.predictor.memory import Columns, Memory, State


@dataclass(frozen=True, slots=True)
class DigestMap:
    """The projections of one layer: keys, queries [Hkv, D, r], centre [Hkv, D]; `vectors` per block, one for each head.

    In a `Digest` they have a batch dimension in front, of size 1 where all rows share them.
    """

    keys: Tensor
    queries: Tensor
    centre: Tensor
    vectors: tuple[int, ...]

    def each(self, change: Callable[[Tensor], Tensor]) -> "DigestMap":
        """Return the map with its tensors changed."""
        return DigestMap(change(self.keys), change(self.queries), change(self.centre), self.vectors)


class Asked(NamedTuple):
    """What an estimate is to be computed for: query [B, Hq, D], the scale of its logits, Hs, and sealed blocks."""

    query: Tensor
    scale: float
    selecting: int
    blocks: int


MEASURED = ("keys", "queries", "centre")
"""The tensors of a map; one that was measured has one vector for every head."""


def mean_key_map(keys: Tensor, block_size: int) -> DigestMap:
    """Return maps of the plain mean key for `keys` [B, Hkv, L, D]: channels in units of their spread over the blocks."""
    heads, dim = keys.shape[1], keys.shape[3]
    means = keys.float().unflatten(2, (-1, block_size)).mean(3)
    centre = means.mean(2)
    spread = (means - centre[:, :, None]).square().mean(2).sqrt().clamp_min(1e-6)
    padded = torch.nn.functional.pad(
        torch.eye(dim, device=keys.device, dtype=torch.float32), (0, dim % 2)
    )  # codes come in pairs
    return DigestMap(padded / spread[..., None], padded * spread[..., None], centre, (1,) * heads)


@final
class Digest(Memory):
    """Codes of one layer, and the estimates for the query that was looked at last."""

    remembers: ClassVar[tuple[str, ...]] = ("_sealed", "estimate")

    def __init__(self, block_size: int, given: DigestMap | None = None) -> None:
        self.block_size, self.given = block_size, given
        self.clear()

    def clear(self) -> None:
        self.map = None if self.given is None else self.given.each(lambda tensor: tensor[None])
        self._sealed = 0
        self.codes: list[tuple[list[int], int, Columns]] = []  # heads, vectors per block, their codes
        self.places: list[Tensor] = []  # the same heads, as `look` needs them
        self._estimate = torch.empty(0, dtype=torch.float32, device="cpu")
        self._asked: Asked | None = None  # what the estimate is to be computed for, until somebody wants it
        self.projections: tuple[float, Tensor] | None = None  # for which scale, and what
        self._prepared: Any = None  # for numba's kernels, while scale and tables are the same

    def state(self) -> State:
        """As of any memory, and the map where it was measured; one that was given comes with the memory."""
        found = super().state()
        if self.given is None and self.map is not None:
            found |= {f"map.{name}": getattr(self.map, name) for name in MEASURED}
        return found

    def restore(self, state: Mapping[str, Any]) -> None:
        self.clear()
        if self.given is None and "map.keys" in state:
            keys, queries, centre = (state[f"map.{name}"] for name in MEASURED)
            self.map = DigestMap(keys, queries, centre, (1,) * keys.shape[1])
        if "table0" in state and self.map is not None:
            self._lay_out(self.map, state["table0"].device)
        super().restore(state)

    def tables(self) -> Sequence[Columns]:
        return [codes for _, _, codes in self.codes]

    @property
    def sealed(self) -> int:
        return self._sealed

    def look_bytes(self) -> int:
        return self.bytes()

    def _begin(self, keys: Tensor) -> DigestMap:
        found = self.map or mean_key_map(keys, self.block_size)
        if found.keys.shape[1:3] != (keys.shape[1], keys.shape[3]):
            raise PredictorError(
                f"got keys of {keys.shape[1]} heads of {keys.shape[3]}, expected {found.keys.shape[1]} of {found.keys.shape[2]}: "
                "the predictor was trained for another model"
            )
        return self._lay_out(found, keys.device)

    def _lay_out(self, found: DigestMap, device: torch.device) -> DigestMap:
        """Make the tables of codes that the map asks for, and return the map as it is used on `device`."""
        self.map = found = found.each(lambda tensor: tensor.to(device))
        self.projections = self._prepared = None
        for vectors in sorted(set(found.vectors)):
            heads = [head for head, own in enumerate(found.vectors) if own == vectors]
            codes = Columns(after=(vectors * found.keys.shape[3] // 2,), dtype=torch.int8)
            self.codes.append((heads, vectors, codes))
            self.places.append(torch.tensor(heads, device=device, dtype=torch.int64))
        spread = torch.tensor([self._spread(vectors) for vectors in found.vectors], device=device, dtype=torch.float32)
        self.units = 1 / spread[:, None, None]
        return found

    def _spread(self, vectors: int) -> float:
        """By what a stored vector is larger than the mean of projected keys that it stands for."""
        # A mean of n independent keys is smaller than a key; the general map measures the means themselves.
        return 1.0 if self.given is None else math.sqrt(self.block_size / vectors)

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

    def seal(self, keys: Tensor) -> None:
        self._settle()
        found = self.map if self.codes and self.map is not None else self._begin(keys)
        centred = keys.float() - found.centre[:, :, None]
        blocks = keys.shape[2] // self.block_size
        for heads, vectors, codes in self.codes:
            projected = centred[:, heads] @ found.keys[:, heads]
            means = projected.unflatten(2, (blocks, vectors, -1)).mean(4)  # [B, Hn, N, vectors, r]
            packed = pack(means * self._spread(vectors))
            stored = codes.reserve(keys.shape[0], len(heads), self._sealed + blocks, keys.device)
            stored[:, :, self._sealed :] = packed.flatten(3)
        self._sealed += blocks

    def _settle(self) -> None:
        """Compute what was asked for, before the codes change."""
        _ = self.estimate

    def crop(self, columns: int) -> None:
        self._settle()
        self._sealed = min(self._sealed, max(0, columns - 1))
        super().crop(self._sealed)

    def select(self, rows: Tensor) -> None:
        self._settle()
        super().select(rows)
        self.projections = self._prepared = None
        if self.map is not None and self.given is None:
            self.map = self.map.each(lambda tensor: tensor[rows.to(tensor.device)])
        self.estimate = self.estimate[rows.to(self.estimate.device)] if self.estimate.numel() else self.estimate

    def repeat(self, times: int) -> None:
        self._settle()
        super().repeat(times)
        self.projections = self._prepared = None
        if self.map is not None and self.given is None:
            self.map = self.map.each(lambda tensor: tensor.repeat_interleave(times, 0))
        self.estimate = self.estimate.repeat_interleave(times, 0) if self.estimate.numel() else self.estimate

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
        return asked, self._for_numba(asked.scale)

    def _for_numba(self, scale: float) -> Any:
        """Return what numba's kernels are told of this layer; the same as before while its tables are."""
        lie = (scale, *[codes.data.data_ptr() for _, _, codes in self.codes])
        if self._prepared is None or self._prepared.key != lie:
            from attnpred.kernels import numba_digest  # numba is loaded when it is used, not before

            assert self.map is not None
            (heads, dim), projection = self.map.keys.shape[1:3], self._projection(scale)
            if self.given is None:  # `mean_key_map`: all else is zero
                projection = projection.diagonal(dim1=-2, dim2=-1).contiguous()
            tables = [(own, vectors, codes.data) for own, vectors, codes in self.codes]
            self._prepared = numba_digest.prepare(tables, tables[0][2].shape[0], heads, dim, projection, lie)
        return self._prepared

    def _projection(self, scale: float) -> Tensor:
        """Return [B or 1, Hkv, D, r], what a query is multiplied with; made once for a model's scale."""
        assert self.map is not None
        if self.projections is None or self.projections[0] != scale:
            self.projections = scale, self.map.queries * (self.units * scale)
        return self.projections[1]

    def shares(self, query: Tensor, scale: float, selecting: int, blocks: int) -> Tensor:
        """Return `estimate` for `query` [B, Hq, D] and the first `blocks` blocks, without keeping it."""
        if blocks == 0:
            return query.new_empty(query.shape[0], selecting, 0, dtype=torch.float32)
        assert self.map is not None
        if kernels.has_native_selection(query):
            from attnpred.kernels import numba_digest  # numba is loaded when it is used, not before

            return numba_digest.look(query, self._for_numba(scale), blocks, selecting)
        batch, kv_heads = query.shape[0], self.map.keys.shape[1]
        own_selections = selecting // kv_heads  # 1, or G where each query head selects for itself
        grouped = query.float().view(batch, kv_heads, query.shape[1] // kv_heads, -1)
        projected = grouped @ self._projection(scale)
        out = torch.empty(batch, kv_heads, own_selections, blocks, device=query.device, dtype=torch.float32)
        for (_, vectors, codes), place in zip(self.codes, self.places, strict=True):
            rows, capacity, size = batch * place.numel(), *codes.data.shape[2:]
            stored = codes.data.view(rows, capacity * vectors, size // vectors)[:, : blocks * vectors]
            parts = projected.index_select(1, place).flatten(0, 1).chunk(own_selections, 1)
            for i, part in enumerate(parts):
                found = kernels.digest_shares(part, stored, vectors).view(batch, -1, blocks)
                out.select(2, i).index_copy_(1, place, found)
        return out.flatten(1, 2)
