"""Run a model over texts and write its attention as traces (`attnpred.predictor.traces`), to train a predictor on.

One dense pass per document: the rows of its last T queries are the true attention of T decode steps with teacher-forced
tokens, so nothing has to be decoded. The pass uses the ordinary cache with a policy that only remembers.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, final

import torch
from torch import Tensor
from tqdm import tqdm

from attnpred import hf
from attnpred.config import CacheConfig
from attnpred.errors import ConfigError
from attnpred.policies.base import Policy, View
from attnpred.predictor.memory import Columns, Memory
from attnpred.predictor.trace_format import TraceMeta
from attnpred.predictor.traces import TraceWriter
from attnpred.reading import read_text


@dataclass(frozen=True, slots=True)
class Captured:
    """What a dense pass showed: `rows` [layers, Hkv, T, N], `queries` [layers, Hq, T, D], `keys` and `values`
    [layers, Hkv, L, D].

    layer_ids: the model's layers, in order. scale: of the logits.
    """

    rows: Tensor
    queries: Tensor
    keys: Tensor
    values: Tensor
    layer_ids: tuple[int, ...]
    scale: float


@final
class Recorder(Memory):
    """Keeps rows, queries, keys and values of one call of one layer."""

    watches: ClassVar[bool] = True

    def __init__(self, rows: int) -> None:
        self.rows = rows
        self.taken = torch.empty(0, dtype=torch.float32, device="cpu")

    def tables(self) -> Sequence[Columns]:
        return ()

    def push(self, rows: Tensor, attended: Tensor | None = None) -> None:
        self.taken = rows

    def watch(self, query: Tensor, keys: Tensor, values: Tensor, scale: float) -> None:
        self.query, self.keys, self.values, self.scale = query, keys, values, scale


@final
@dataclass(frozen=True, slots=True)
class Remember(Policy[Recorder]):
    """Keep everything that is shown; score nothing."""

    rows: int

    def memory(self, config: CacheConfig, layer: int) -> Recorder:
        return Recorder(self.rows)

    def score(self, view: View[Recorder]) -> Tensor:
        return torch.zeros(1, 1, view.zone.blocks, dtype=torch.float32, device="cpu")


@torch.no_grad()
def captured(
    model: Any,
    tokens: Tensor,
    rows: int,
    block_size: int = 16,
    *,
    per_query_head: bool = False,
    text: hf.TieredCache | None = None,
) -> Captured:
    """Return the true attention of the last `rows` queries of `tokens` [1, L], and what it came from.

    Layers are the full-attention layers, in order. per_query_head: rows are [layers, Hq, T, N]. text: a cache of the first
    tokens, up to the last `rows` at most, which are not read again then.
    """
    settings = CacheConfig(
        budget=3 * block_size,
        block_size=block_size,
        num_sink_tokens=0,
        recent_window=block_size,
        history=rows,
        dense_layers=0,
        dense_when_fits=False,
        per_query_head=per_query_head,
    )
    policy = Remember(rows)
    with hf.attach(model, policy=policy, config=settings):
        cache = hf.TieredCache(model.config, policy=policy, config=settings)
        # Layers that share another layer's keys may see no more queries than there are logits to keep.
        shares = getattr(cache.model_config, "num_kv_shared_layers", 0)
        if text is not None:
            hf.carry_over(text, cache)
        new = tokens[:, cache.get_seq_length() :]
        model(new, cache=cache, use_cache=True, logits_to_keep=rows if shares else 1)
    layers = tuple(sorted(cache.decoders))
    seen: list[Recorder] = [cache.decoders[layer].memory for layer in layers]
    if any(memory.taken.shape[2] < rows for memory in seen):
        raise ConfigError(f"got a layer that saw fewer than {rows} queries, expected all of them: lower --rows")
    return Captured(
        torch.stack([memory.taken[0] for memory in seen]),
        torch.stack([memory.query[0] for memory in seen]),
        torch.stack([memory.keys[0] for memory in seen]),
        torch.stack([memory.values[0] for memory in seen]),
        layers,
        seen[0].scale,
    )


def attention_trace(model: Any, tokens: Tensor, rows: int, block_size: int = 16) -> Tensor:
    """Return the true attention [layers, Hkv, rows, N] of the last `rows` queries of `tokens` [1, L]: block maxima."""
    return captured(model, tokens, rows, block_size).rows


def trace_meta(model: Any, found: Captured, base_model: str, rows: int, block_size: int) -> TraceMeta:
    """Return what the traces of `model` share, from one of them; `rows` at most in a document."""
    return TraceMeta(
        base_model=base_model,
        fingerprint=hf.fingerprint(model.config),
        block_size=block_size,
        layers=found.rows.shape[0],
        heads=found.rows.shape[1],
        rows=rows,
        created_by="attnpred capture",
        query_heads=found.queries.shape[1],
        head_dim=found.queries.shape[3],
        layer_ids=" ".join(map(str, found.layer_ids)),
        scale=found.scale,
    )


def documents(name: str, text: str, tokenizer: Any, tokens: int) -> Iterator[tuple[str, Tensor]]:
    """Cut a text into (name, token ids [1, tokens]) pieces that do not overlap; a rest that is too short is left out."""
    ids = tokenizer(text, return_tensors="pt", verbose=False)["input_ids"]
    for i in range(ids.shape[1] // tokens):
        yield f"{name}-{i:04d}", ids[:, i * tokens : (i + 1) * tokens]


def capture(
    model: Any,
    tokenizer: Any,
    files: Iterable[Path],
    out: Path,
    *,
    base_model: str,
    tokens: int = 4096,
    rows: int = 512,
    block_size: int = 16,
    per_file: int | None = None,
) -> int:
    """Write traces of `files` (text) into `out`; return how many documents it holds. Documents already there are kept.

    tokens: length of a document; rows: its last queries that are recorded; per_file: at most this many documents a file.
    """
    if not 1 <= rows <= tokens:
        raise ConfigError(f"got rows={rows}, expected 1 to tokens={tokens}: record at most every query of a document")
    files = sorted(files)
    names = [file.stem for file in files]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ConfigError(f"got two files named {twice[0]!r}, expected different names: documents are named after them")
    writer: TraceWriter | None = None
    count = 0
    for file in tqdm(files, desc="capture", unit="file"):
        text = read_text(file)
        for index, (name, ids) in enumerate(documents(file.stem, text, tokenizer, tokens)):
            if per_file is not None and index >= per_file:
                break
            count += 1
            if writer is not None and writer.has(name):
                continue
            trace = captured(model, ids.to(model.device), rows, block_size)
            if writer is None:
                meta = trace_meta(model, trace, base_model, rows, block_size)
                writer = TraceWriter(out, meta)
            if not writer.has(name):
                writer.add(name, trace.rows, tokens - rows, trace.queries, trace.keys)
    if count == 0:
        raise ConfigError(
            f"got no text of at least {tokens} tokens, expected one: give longer files, or lower --tokens"
        )
    return count
