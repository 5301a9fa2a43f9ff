"""`Memory`: what a policy remembers of one layer, and `Columns`, the growing tensor that memories are made of.

The decode step owns a memory, feeds it, and keeps it consistent with the cache (`crop`, `select`, `repeat`, `clear`);
the policy that made it reads it. It is fed in this order, once per token (a prompt feeds its last rows at once):

    meet    the last queries of a dense call, of which the rows are pushed after its keys are sealed
    seal    keys of blocks that have just become full; other keys a memory sees only as means (`renew`), if it wants them
    look    the query that attends next (before a selection that may use it) or that attended last (after it)
    push    the attention row of that query: what it put on the blocks it attended

A memory that has no use for one of these ignores it.

For a saved cache a memory is its `state`: its tables, the attributes that it names in `remembers`, and its parts, which
are memories themselves. A memory that was made for the same layer, and `restore`d, goes on as the other would.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, final

import torch
from torch import Tensor

State = dict[str, Any]
"""Tensors and plain numbers by name."""


def inside(prefix: str, state: Mapping[str, Any]) -> State:
    """Return what `state` has under `prefix`, without it."""
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}


def spread(selection: Tensor, maxima: Tensor, blocks: int) -> tuple[Tensor, Tensor]:
    """Return one row of `blocks` blocks, [B, Hs, 1, blocks], and where it knows its block, as `Memory.push` takes them.

    selection [B, Hs, K] are the blocks that were attended, -1 for none, and maxima what was put on them.
    """
    # Other blocks stay at -1; column `blocks` takes what id -1 would write.
    row = maxima.new_full((*selection.shape[:2], blocks + 1), -1.0)
    row.scatter_(2, selection.masked_fill(selection < 0, blocks), maxima)
    row = row[:, :, None, :blocks]
    return row.clamp_min(0.0), row >= 0


@final
class Columns:
    """A tensor [B, Hs, *before, N, *after] whose dimension N, the blocks, grows; new columns hold `fill`."""

    def __init__(
        self,
        before: tuple[int, ...] = (),
        after: tuple[int, ...] = (),
        fill: float = 0.0,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.before, self.after, self.fill, self.dtype = before, after, fill, dtype
        self.axis = 2 + len(before)
        self.clear()

    def clear(self) -> None:
        """Forget everything and release the memory."""
        self.count = 0
        self.data = torch.empty(0, dtype=torch.float32, device="cpu")

    def reserve(self, batch: int, heads: int, columns: int, device: torch.device) -> Tensor:
        """Have at least `columns` columns; return the first `columns`."""
        capacity = self.data.shape[self.axis] if self.data.numel() else 0
        if columns > capacity:
            size = columns * 17 // 16 + 16 if capacity else columns + 16
            shape = (batch, heads, *self.before, size, *self.after)
            grown = torch.full(shape, self.fill, dtype=self.dtype, device=device)
            if capacity:
                grown.narrow(self.axis, 0, self.count).copy_(self.view())
            self.data = grown
        self.count = max(self.count, columns)
        return self.data.narrow(self.axis, 0, columns)

    def view(self) -> Tensor:
        """Return the columns in use, without copying."""
        return self.data.narrow(self.axis, 0, self.count)

    def state(self) -> Tensor:
        """Return the columns in use; a tensor of one dimension where there never were any."""
        return self.view() if self.data.ndim > 1 else self.data

    def restore(self, state: Tensor) -> None:
        """Take over the columns, and their kind, of another's `state`."""
        self.clear()
        if state.ndim > 1:
            self.data, self.count, self.dtype = state.contiguous(), state.shape[self.axis], state.dtype
            self.after = tuple(state.shape[self.axis + 1 :])

    def crop(self, columns: int) -> None:
        """Forget the columns from `columns` on."""
        if columns < self.count:
            self.data.narrow(self.axis, columns, self.count - columns).fill_(self.fill)
            self.count = columns

    def select(self, rows: Tensor) -> None:
        """Make the batch `rows` of the old one: an index or a boolean mask."""
        if self.data.numel():
            self.data = self.data[rows.to(self.data.device)]

    def repeat(self, times: int) -> None:
        """Repeat each batch row `times` times, side by side."""
        if self.data.numel():
            self.data = self.data.repeat_interleave(times, 0)

    def bytes(self) -> int:
        """Bytes of the columns in use."""
        return self.view().numel() * self.data.element_size() if self.data.numel() else 0


class Memory(ABC):
    """Interface, and what follows from the list of its tables; concrete memories are final."""

    rows: int = 0
    """How many of a prompt's last attention rows it wants; 0 means that it takes no rows at all."""
    every: bool = False
    """It wants the rows of all queries of all dense calls, some at a time, and not only the last `rows`."""
    watches: ClassVar[bool] = False
    """It wants dense calls as a whole (`watch`)."""
    remembers: ClassVar[tuple[str, ...]] = ()
    """Its attributes that belong to the sequence beside tables and parts: tensors and plain numbers."""

    @abstractmethod
    def tables(self) -> Sequence[Columns]:
        """Return everything it remembers per block, itself."""

    def parts(self) -> Mapping[str, "Memory"]:
        """Return the memories that it is made of, by name."""
        return {}

    def _members(self) -> "list[Columns | Memory]":
        return [*self.tables(), *self.parts().values()]

    def state(self) -> State:
        """Return everything it remembers; tensors are its own, not copies."""
        found: State = {f"table{i}": table.state() for i, table in enumerate(self.tables())}
        found |= {name: getattr(self, name) for name in self.remembers}
        for name, part in self.parts().items():
            found |= {f"{name}.{key}": value for key, value in part.state().items()}
        return found

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from the `state` of another memory of the same layer, whose tensors are this one's from now on."""
        for i, table in enumerate(self.tables()):
            table.restore(state[f"table{i}"])
        for name in self.remembers:
            setattr(self, name, state[name])
        for name, part in self.parts().items():
            part.restore(inside(f"{name}.", state))

    def meet(self, query: Tensor, scale: float) -> None:
        """Take in the queries [B, Hq, R, D] whose rows are pushed next, and the scale of their logits."""

    def wants_means(self, queries: int) -> bool:
        """Say, before `meet`, whether it wants the mean keys of all full blocks with a dense call of so many queries."""
        return False

    def renew(self, means: Tensor) -> None:
        """Take in the mean keys of all full blocks, [B, Hkv, N, D], in place of what it was told of their keys before."""

    def seal(self, keys: Tensor) -> None:
        """Take in the keys of newly filled blocks, [B, Hkv, whole blocks * P, D], in order."""

    @property
    def sealed(self) -> int:
        """Blocks whose keys it has seen; -1 if it wants none."""
        return -1

    def read(self, tokens: Tensor, length: int) -> None:
        """Take in the ids [B, Q] of the tokens of a call, the last of a context of `length`, before anything else of it."""

    def look(self, query: Tensor, scale: float, selecting: int) -> None:
        """Take in one query per row, [B, Hq, D], and the scale of its logits, for `selecting` = Hs heads."""

    def push(self, rows: Tensor, attended: Tensor | None = None) -> None:
        """Take in rows [B, Hs, R, N], oldest first; `attended` is True where a row knows its block, None: everywhere."""

    def push_attended(self, selection: Tensor, maxima: Tensor, blocks: int) -> None:
        """Take in one row by what was attended: block ids [B, Hs, K], -1 for none, and their maxima, of `blocks` blocks."""
        self.push(*spread(selection, maxima, blocks))

    def follow(self, leader: "Memory") -> None:
        """Go by `leader`, the memory of an earlier layer (`Policy.leader`); said once, before anything else."""
        raise AssertionError(f"{type(self).__name__} follows no other layer")

    def wants_all(self, query: Tensor) -> Tensor | None:
        """Say which batch rows, [B], are to attend to everything with `query` [B, Hq, D] in this step; None: no row.

        Asked once per decode step, before anything is looked at. What these rows put on all blocks is pushed, and then the
        query is looked at.
        """
        return None

    def watch(self, query: Tensor, keys: Tensor, values: Tensor, scale: float) -> None:
        """Take in a dense call as a whole, query [B, Hq, Q, D], all keys and values: for capture alone."""

    def look_bytes(self) -> int:
        """Bytes that a `look` reads."""
        return 0

    @property
    def is_empty(self) -> bool:
        """True where it knows nothing to choose by."""
        return False

    def clear(self) -> None:
        """Forget the sequence."""
        for part in self._members():
            part.clear()

    def crop(self, columns: int) -> None:
        """Forget blocks from `columns` on, and that block `columns` - 1 was full (their tokens were removed)."""
        for part in self._members():
            part.crop(columns)

    def select(self, rows: Tensor) -> None:
        """Make the batch `rows` of the old one (beams)."""
        for part in self._members():
            part.select(rows)

    def repeat(self, times: int) -> None:
        """Repeat each batch row `times` times."""
        for part in self._members():
            part.repeat(times)

    def _map(self, change: Callable[[Tensor], Tensor]) -> None:
        """Change the tensors it `remembers`, for memories where all that are not empty have a row per batch row."""
        for name in self.remembers:
            value = getattr(self, name)
            if isinstance(value, Tensor) and value.numel():
                setattr(self, name, change(value))

    def bytes(self) -> int:
        """Bytes it holds."""
        return sum(part.bytes() for part in self._members())


@final
class NoMemory(Memory):
    """For policies that need nothing."""

    def tables(self) -> Sequence[Columns]:
        return ()
