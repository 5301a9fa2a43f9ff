"""How well a policy chooses: the attention it recovers, step by step, on captured queries and keys.

A document is read once by the model with dense attention; queries and keys of its last tokens are kept. Then every policy
decodes these tokens again with the real decode step (`attnpred.decode`): the same queries for all, but each with the
history that its own selections produced. Recovery is the true attention inside the selection, the mean over query
heads; the recovery ratio is against the best selection of as many blocks, sinks and recent window not forced on it.

Documents of one length are replayed side by side, as a batch.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from attnpred.capture import Captured, captured
from attnpred.config import CacheConfig
from attnpred.decode import LayerDecoder
from attnpred.errors import ConfigError
from attnpred.kernels.dense import AttentionTerms
from attnpred.policies.base import Policy
from attnpred.predictor.block_truth import block_truth
from attnpred.predictor.traces import Vectors
from attnpred.store.pool import BlockPool
from attnpred.telemetry import LayerCounts, total


@dataclass(frozen=True, slots=True)
class Document:
    """A text as the model saw it: queries [layers, Hq, T, D] of its last T tokens; keys, values [layers, Hkv, L, D]."""

    kind: str
    name: str
    queries: Tensor
    keys: Tensor
    values: Tensor
    layer_ids: tuple[int, ...]
    scale: float
    _masses: dict[int, Tensor] = field(default_factory=dict)

    @property
    def length(self) -> int:
        """Tokens."""
        return self.keys.shape[2]

    @property
    def steps(self) -> int:
        """T."""
        return self.queries.shape[2]

    def mass(self, block_size: int) -> Tensor:
        """Return the true attention of the queries on blocks of that size, of a group's sum: [layers, Hkv, T, N]."""
        if block_size not in self._masses:
            vectors = Vectors(self.queries, self.keys, self.length - self.steps)
            found = block_truth(vectors, self.scale, block_size).mass
            self._masses[block_size] = found.unflatten(0, (self.queries.shape[0], -1)).half()
        return self._masses[block_size]


@dataclass(frozen=True, slots=True)
class Recovery:
    """Per document, layer and kv head, over the steps: sums [documents, layers, Hkv] unless the name says otherwise.

    kept, best: attention inside the selection, and inside the best one, per query head. hits: share of the best blocks that
    were chosen. error: how far the attention's output lies from the full one, over the length of that. new: share of the
    selection that was not in the last one. ratios: [documents, layers, Hkv, steps]. late: share of the chosen blocks that
    the forecast had missed, or None. state: bytes per byte of keys and values.
    """

    kept: Tensor
    best: Tensor
    hits: Tensor
    error: Tensor
    new: Tensor
    ratios: Tensor
    late: float | None
    state: float


def read_document(model: Any, tokens: Tensor, rows: int, kind: str, name: str) -> Document:
    """Read `tokens` [1, L] and keep what its last `rows` queries need."""
    found: Captured = captured(model, tokens.to(model.device), rows)
    queries, keys, values = (tensor.half().cpu() for tensor in (found.queries, found.keys, found.values))
    return Document(kind, name, queries, keys, values, found.layer_ids, found.scale)


@torch.no_grad()
def measure(documents: Sequence[Document], policy: Policy[Any], settings: CacheConfig) -> Recovery:
    """Replay `documents`, all of one length, with `policy`; the first `settings.history` rows are the prompt's."""
    if len({document.length for document in documents}) != 1:
        raise ConfigError("got documents of several lengths, expected one: measure them apart")
    settings, steps = policy.settle(settings), documents[0].steps
    if settings.history >= steps:
        raise ConfigError(f"got history={settings.history} for documents of {steps} rows, expected fewer: lower it")
    found = [_layer(documents, layer, policy, settings) for layer in range(len(documents[0].layer_ids))]
    kept, best, hits, error, new, ratios = (
        torch.stack(columns, 1) for columns in zip(*(x[0] for x in found), strict=True)
    )
    counts = total([x[1] for x in found])
    late = float(counts.late) / counts.chosen if counts.chosen else None
    return Recovery(kept, best, hits, error, new, ratios, late, sum(x[2] for x in found) / len(found))


class _Replayed:
    """One layer of all documents side by side, and before it the layer that chooses for it, if there is one."""

    def __init__(self, documents: Sequence[Document], layer: int, policy: Policy[Any], settings: CacheConfig) -> None:
        ids = documents[0].layer_ids
        leader = ids.index(policy.leader(ids[layer], ids))
        self.before: _Replayed | None = None if leader == layer else _Replayed(documents, leader, policy, settings)
        self.queries = torch.stack([document.queries[layer] for document in documents]).float()
        self.keys = torch.stack([document.keys[layer] for document in documents]).float()
        self.values = torch.stack([document.values[layer] for document in documents]).float()
        self.counts, self.pool = LayerCounts(), BlockPool(settings.block_size)
        followed: Any = None if self.before is None else self.before.decoder.memory
        self.decoder: LayerDecoder = LayerDecoder(settings, policy, self.counts, ids[layer], followed)
        self.terms = AttentionTerms(documents[0].scale)
        self.first = self.keys.shape[2] - self.queries.shape[2]
        prompt = self.first + settings.history
        self.pool.append(self.keys[:, :, :prompt], self.values[:, :, :prompt])
        self.full = self._full()  # what attending to everything gives, for all queries, [documents, Hq, T, D]
        asked, told = (x[:, :, : settings.history] for x in (self.queries, self.full))
        self.decoder.observe(asked, self.pool, self.terms, None, prompt=True, output=told)

    def step(self, step: int) -> Tensor:
        """Decode the token of query `step`; return the attention's output [documents, Hq, D]."""
        if self.before is not None:
            self.before.step(step)
        place = slice(self.first + step, self.first + step + 1)
        self.pool.append(self.keys[:, :, place], self.values[:, :, place])
        return self.decoder.step(self.queries[:, :, step], self.pool, self.terms, None)

    def _full(self) -> Tensor:
        length, steps = self.keys.shape[2], self.queries.shape[2]
        places = torch.arange(length, device="cpu")
        allowed = places <= torch.arange(length - steps, length, device="cpu")[:, None]
        return torch.nn.functional.scaled_dot_product_attention(
            self.queries, self.keys, self.values, allowed, scale=self.terms.scale, enable_gqa=True
        )


def _layer(
    documents: Sequence[Document], layer: int, policy: Policy[Any], settings: CacheConfig
) -> tuple[tuple[Tensor, ...], LayerCounts, float]:
    replayed = _Replayed(documents, layer, policy, settings)
    queries, keys, decoder, counts = replayed.queries, replayed.keys, replayed.decoder, replayed.counts
    mass = torch.stack([document.mass(settings.block_size)[layer] for document in documents]).float()
    full = replayed.full
    group = queries.shape[1] // keys.shape[1]
    length, blocks = keys.shape[2], mass.shape[-1]
    last: Tensor | None = None
    found: list[tuple[Tensor, ...]] = []
    for step in range(settings.history, queries.shape[2]):
        output = replayed.step(step)
        assert decoder.attended is not None
        selection = decoder.attended[1]
        chosen = torch.zeros(*selection.shape[:2], blocks + 1, dtype=torch.bool, device="cpu")
        chosen = chosen.scatter_(2, selection.masked_fill(selection < 0, blocks), True)[..., :blocks]
        if chosen.shape[1] != mass.shape[1]:  # one selection per query head: what a kv head reads is their union
            chosen = chosen.unflatten(1, (mass.shape[1], -1)).any(2)
        best = mass[:, :, step].topk(min(selection.shape[2], blocks), -1)
        hit = chosen.gather(2, best.indices).float().mean(-1)
        kept = (mass[:, :, step] * chosen).sum(-1) / group
        size = chosen.sum(-1).clamp_min(1)
        new = torch.zeros_like(hit) if last is None else (chosen & ~last).sum(-1) / size
        true = full[:, :, step]
        error = (
            ((output - true).norm(dim=-1) / true.norm(dim=-1).clamp_min(1e-9)).unflatten(1, (mass.shape[1], -1)).mean(2)
        )
        found.append((kept, best.values.sum(-1) / group, hit, error, new))
        last = chosen
    kept, best_mass, hits, error, fresh = (torch.stack(column, -1) for column in zip(*found, strict=True))
    kv_bytes = keys.shape[1] * keys.shape[3] * 2 * 2 * length * len(documents)  # keys and values in half precision
    ratios = kept / best_mass.clamp_min(1e-9)
    columns = kept.mean(-1), best_mass.mean(-1), hits.mean(-1), error.mean(-1), fresh[..., 1:].mean(-1), ratios
    return columns, counts, decoder.memory.bytes() / kv_bytes
