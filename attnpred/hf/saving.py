"""A cache as a file, written all of it or nothing; `attnpred.hf.loading` reads it.

It is a safetensors file. Of each full-attention layer it holds the units of all full blocks as they lie in the slow tier
(`layers.0.units`), their check values (`layers.0.checks`), and the tokens of the open block; of a sliding layer its keys and
values; of each decoder its memory and selections (`decoders.0.*`); and the token ids, if they are known. All else is in the
metadata (`attnpred.hf.header`), with a check value of every tensor that has none of its own.
"""

import hashlib
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from attnpred.errors import CacheFileError, ShapeError
from attnpred.hf.cache import TieredCache
from attnpred.hf.header import Header, name_of
from attnpred.hf.layer import SLIDING, TieredLayer
from attnpred.hf.weights import answers, hash_samples
from attnpred.store.codec import checks
from attnpred.store.export import Export
from attnpred.store.safetensors_file import Entry, write
from attnpred.store.tier import buffer

TOKENS = "tokens"
NOTHING = "DummyLayer"
"""Another stock layer that can be saved, by name: it is one of nothing."""
WINDOW = ("sliding_window", "cumulative_length", "record_past")
"""What a sliding layer is beside its keys and values."""


def save(
    cache: TieredCache, path: str | Path, tokens: Tensor | None = None, model: PreTrainedModel | None = None
) -> None:
    """Write `cache`; see `TieredCache.save`."""
    cache.require_usable()
    cache.require_whole()
    length = cache.get_seq_length()
    if not length:
        raise CacheFileError("got an empty cache, expected one that holds tokens: give it a prompt before it is saved")
    computed = model or (None if cache.model is None else cache.model())
    if computed is None:
        raise CacheFileError(
            "got a cache of a model that is not known (gone, or never attached), expected the one that computed the keys: "
            "save(path, model=model)"
        )
    layers: list[dict[str, Any]] = []
    large: list[Entry] = []
    small: dict[str, Tensor] = {}
    for index, layer in enumerate(cache.layers):
        said, entries, tensors = _saved_layer(layer, f"layers.{index}.", length // cache.settings.block_size)
        layers.append(said)
        large += entries
        small |= tensors
    batch, dtype = next((x.shape[0], x.dtype) for x in small.values())
    decoders: dict[str, dict[str, Any]] = {}
    for index, decoder in cache.decoders.items():
        state = decoder.state()
        decoders[str(index)] = {name: x for name, x in state.items() if not isinstance(x, Tensor)}
        small |= {f"decoders.{index}.{name}": x for name, x in state.items() if isinstance(x, Tensor)}
    ids = _token_ids(cache.tokens, tokens, batch, length)
    if ids is not None:
        small[TOKENS] = ids
    small = {name: tensor.detach().cpu().contiguous() for name, tensor in small.items()}
    header = Header.of(
        cache.model_config,
        cache.settings,
        cache.policy,
        weights=hash_samples(computed),
        answers=answers(computed),
        dtype=name_of(dtype),
        length=length,
        batch=batch,
        tokens=None if ids is None else hashlib.sha256(buffer(small[TOKENS])).hexdigest(),
        layers=layers,
        decoders=decoders,
        sums={name: check_value(name, tensor) for name, tensor in small.items()},
    )
    cache.require_usable()  # all of it was taken before another thread closed it
    # Widest types first, so that each tensor starts where its type may; units are whole numbers of 8 bytes.
    rest = sorted(small.items(), key=lambda item: -item[1].dtype.itemsize)
    large += [Entry(name, tensor.dtype, tuple(tensor.shape), [tensor]) for name, tensor in rest]
    write(Path(path).expanduser(), large, header.to_metadata())


def _saved_layer(layer: Any, name: str, blocks: int) -> tuple[dict[str, Any], list[Entry], dict[str, Tensor]]:
    """Return what the header says of a layer, what is written of it piece by piece, and its other tensors."""
    kind = type(layer).__name__
    said: dict[str, Any] = {"kind": kind}
    entries: list[Entry] = []
    tensors: dict[str, Tensor] = {}
    if type(layer) is TieredLayer:
        if layer.store.length:
            export = layer.store.export()
            said["codec"] = export.codec
            entries = _block_entries(name, export, blocks)
            tensors = {f"{name}keys": export.keys, f"{name}values": export.values}
    elif kind == SLIDING:
        said |= {attribute: getattr(layer, attribute) for attribute in WINDOW}
        if layer.is_initialized:
            tensors = {f"{name}keys": layer.keys, f"{name}values": layer.values}
    elif kind != NOTHING:
        raise CacheFileError(
            f"got a cache layer of type {kind}, expected keys and values: such a cache stays in memory"
        )
    return said, entries, tensors


def _block_entries(name: str, export: Export, blocks: int) -> list[Entry]:
    """Return the entries of a layer's units, and of their check values, which are known when the units are written."""
    shape, seals = (export.keys.shape[0], blocks, export.keys.shape[1]), list[Tensor]()

    def sealed() -> Iterator[Tensor]:
        for piece in export.units:
            seals.append(checks(piece))
            yield piece

    return [
        Entry(f"{name}units", torch.uint8, (*shape, export.unit_bytes), sealed()),
        Entry(f"{name}checks", torch.int32, shape, seals),
    ]


def _token_ids(known: Tensor | None, given: Tensor | None, batch: int, length: int) -> Tensor | None:
    """Return the ids [B, L] to be saved: those given, which may go on beyond the cache, or those that are known."""
    if given is None:
        return known if known is not None and known.shape == (batch, length) else None
    ids = given[None] if given.ndim == 1 else given
    if ids.ndim != 2 or ids.shape[0] != batch or ids.shape[1] < length:
        raise ShapeError(
            f"got tokens of shape {tuple(given.shape)}, expected ({batch}, {length}) or longer: give all that the cache has seen"
        )
    return ids[:, :length].to(torch.int64)


def check_value(name: str, tensor: Tensor) -> int:
    """Return a check value of a contiguous tensor in host memory, its name, type and shape."""
    start = zlib.crc32(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
    return zlib.crc32(buffer(tensor), start)
