"""`DenseCalls`: the calls of a layer that attend to everything, prompts above all. Their last rows seed the memory.

The attention of a prompt is computed by others (`observe`); that of a chunk of a prompt, a second turn or the verification
of drafted tokens goes over the pieces of the store (`attend`), and so does a single token that is to attend to everything.
For a policy that evicts, everything is what it has left.
"""

from collections.abc import Iterator
from typing import Any, final

import torch
from torch import Tensor

from attnpred.choosing import Call, Chooser
from attnpred.config import CacheConfig
from attnpred.kernels.remaining import QUERIES, attend_blocks
from attnpred.kernels.streamed import StreamedAttention, StreamedMeans, StreamedRows
from attnpred.policies.base import Policy
from attnpred.rest_rows import MeanKey, RestRows
from attnpred.shapes import num_blocks
from attnpred.store.base import Store


@final
class DenseCalls:
    """Beside the decode step of one layer, with the same memory and chooser; `rest` learns what steps leave out, or None."""

    def __init__(
        self, config: CacheConfig, policy: Policy[Any], memory: Any, chooser: Chooser, rest: RestRows | None = None
    ) -> None:
        self.config, self.policy, self.memory, self.chooser, self.rest = config, policy, memory, chooser, rest

    def observe(self, call: Call, keys: Tensor | None, output: Tensor | None = None) -> None:
        """Take in a call whose attention is computed elsewhere; keys [B, Hkv, L, D]: all of them, or None: read them back.

        Rows are computed only when they may be needed: when the context is within H tokens of outgrowing the budget. output
        [B, Hq, R, Dv]: of the last R queries, from which is learned what steps leave out; None: nothing is.
        """
        store, rows = call.store, self._begin(call)
        means, mean = self._means(call, rows), self._mean(call, rows)
        if rows is not None:
            for start, piece in _pieces(store, keys):
                rows.add(start, piece)
                for other in (means, mean):
                    if other is not None:
                        other.add(start, piece)
        if self.memory.every:
            self._push_every(call, keys)
        self._take_in(call, rows, means, keys, mean, output)

    def attend(self, call: Call, *, remember: bool) -> Tensor:
        """Return the attention to everything, [B, Hq, Q, D]; `observe` is included if `remember`."""
        if self.chooser.left.kept is not None:
            return self._attend_left(call)
        query, store = call.query, call.store
        attention = StreamedAttention(query, store.length, call.terms, call.mask, store.piece_tokens)
        rows = self._begin(call) if remember else None
        means, mean = self._means(call, rows), self._mean(call, rows)
        whole = store.whole() if query.shape[2] == 1 else None
        if whole is not None:
            attention.add(*whole)
        for piece in store.pieces() if whole is None or rows is not None else ():
            if whole is None:
                attention.add(*piece)
            if rows is not None:
                rows.add(piece.start, piece.keys)
            for other in (means, mean):
                if other is not None:
                    other.add(piece.start, piece.keys)
        output = attention.result()
        if remember:
            if self.memory.every:
                self._push_every(call, None)
            self._take_in(call, rows, means, None, mean, output)
        return output

    def _begin(self, call: Call) -> StreamedRows | None:
        """Prepare; return what computes the last rows of the call, if any are wanted."""
        query, store = call.query, call.store
        self.chooser.begin(store, query.shape[2], call.mask)
        recent = min(query.shape[2], max(self._rows, 0 if self.rest is None else self.config.history))
        if not recent or not self._needs_memory(store):
            return None
        shown = None if call.mask is None else call.mask[:, -recent:]
        return StreamedRows(query[:, :, -recent:], store.length, call.terms, shown, block_size=store.block_size)

    def _means(self, call: Call, rows: StreamedRows | None) -> StreamedMeans | None:
        """Return what computes the means of all keys, if the memory wants them beside `rows`."""
        if rows is None or not self._rows or not self.memory.wants_means(call.query.shape[2]):
            return None
        return StreamedMeans(call.store.block_size)

    def _mean(self, call: Call, rows: StreamedRows | None) -> MeanKey | None:
        """Return what computes the mean of all keys, if it is to be learned what steps leave out."""
        return MeanKey(call) if rows is not None and self.rest is not None and self.rest.wants(call) else None

    @property
    def _rows(self) -> int:
        """How many last rows the memory takes."""
        return 0 if self.memory.every else self.memory.rows

    def _needs_memory(self, store: Store) -> bool:
        if self.policy.is_dense:
            return False
        return self.memory.every or not self.chooser.fits(store.length + self.config.history)

    def _take_in(
        self,
        call: Call,
        rows: StreamedRows | None,
        means: StreamedMeans | None,
        keys: Tensor | None,
        mean: MeanKey | None = None,
        output: Tensor | None = None,
    ) -> None:
        query, store = call.query, call.store
        if not self._needs_memory(store):
            return
        taken = None if rows is None or not self._rows else rows.query[:, :, -self._rows :]
        if taken is not None:
            self.memory.meet(taken, call.terms.scale)
        if means is not None:
            self.memory.renew(means.result())
        seal(self.memory, store, keys)
        if rows is not None and taken is not None:
            self.memory.push(rows.result(call.heads)[:, :, -self._rows :])
            if self.memory.watches:
                self.memory.watch(taken, *store.view(), call.terms.scale)
        if rows is not None and mean is not None and output is not None and self.rest is not None:
            self.rest.learn(call, output, rows.normaliser, mean.scaled())
        if self.chooser.forecasts:
            self.memory.look(query[:, :, -1], call.terms.scale, call.heads)
        self.chooser.forecast(call)

    def _push_every(self, call: Call, keys: Tensor | None) -> None:
        """Show the memory the rows of all queries of a dense call, some at a time."""
        query, store, mask = call.query, call.store, call.mask
        size, blocks = store.block_size, num_blocks(store.length, store.block_size)
        shown = store.view()[0] if keys is None else keys
        for first in range(0, query.shape[2], QUERIES):
            part = query[:, :, first : first + QUERIES]
            seen = store.length - query.shape[2] + first + part.shape[2]
            allowed = None if mask is None else mask[:, first : first + QUERIES, :seen]
            rows = StreamedRows(part, seen, call.terms, allowed, block_size=size)
            for start in range(0, seen, store.piece_tokens):
                rows.add(start, shown[:, :, start : min(start + store.piece_tokens, seen)])
            row = rows.result(call.heads)
            self.memory.push(torch.nn.functional.pad(row, (0, blocks - row.shape[3])))

    def _attend_left(self, call: Call) -> Tensor:
        """Attend to all that eviction has left, and go on: `attend` for a policy that evicts."""
        query, store, mask = call.query, call.store, call.mask
        self._begin(call)
        queries, blocks = query.shape[2], num_blocks(store.length, store.block_size)
        ids = self.chooser.left.blocks(blocks)
        outputs, rows, several = [], [], min(QUERIES, store.queries_alike or QUERIES)
        for first in range(0, queries, several):
            part, position = query[:, :, first : first + several], store.length - queries + first
            keys, values, slots = store.wait_at(ids, position + part.shape[2])
            shown = None if mask is None else mask[:, first : first + several]
            output, maxima = attend_blocks(
                part, keys, values, ids, slots, position, call.terms, shown, block_size=store.block_size
            )
            outputs.append(output)
            wanted = part.shape[2] if self.memory.every else part.shape[2] - max(0, queries - self.memory.rows - first)
            if self.memory.rows and wanted > 0:
                row = maxima.new_zeros(*maxima.shape[:3], blocks + 1)
                places = ids.masked_fill(ids < 0, blocks)[:, :, None].expand_as(maxima)
                rows.append(row.scatter_(3, places, maxima)[:, :, -wanted:, :blocks])
        for some in rows if self.memory.every else [torch.cat(rows, 2)] if rows else []:
            self.memory.push(some)
        self._take_in(call, None, None, None)
        return torch.cat(outputs, 2)


def _pieces(store: Store, keys: Tensor | None) -> Iterator[tuple[int, Tensor]]:
    """Yield the first token of each piece of the store, and its keys: of all `keys` [B, Hkv, L, D], if they are at hand."""
    if keys is None:
        yield from ((piece.start, piece.keys) for piece in store.pieces())
        return
    for start in range(0, store.length, store.piece_tokens):
        yield start, keys[:, :, start : min(start + store.piece_tokens, store.length)]


def seal(memory: Any, store: Store, keys: Tensor | None = None) -> None:
    """Show `memory` the keys of blocks that have become full: of all `keys` [B, Hkv, L, D], if they are at hand."""
    size, sealed, full = store.block_size, memory.sealed, store.length // store.block_size
    if 0 <= sealed < full:
        new = store.keys_of(sealed, full) if keys is None else keys[:, :, sealed * size : full * size]
        memory.seal(new)
