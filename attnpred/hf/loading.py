"""A saved cache, ready to go on in the time that its header and tables take; blocks are read when they are needed.

With `offload` the file becomes a part of the slow tier, which is read and never written; without, a layer is read when it is
first used. So the file may be replaced while a cache of it is in use (the old one stays as long as it is open), but must not
be changed in place.

Nothing of a damaged file becomes a token: units are compared with their check values when they are read, the other tensors
and the header when the cache is loaded.

All of a loaded cache lies on the device of the model, which must be one.
"""

import logging
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from attnpred.config import CacheConfig
from attnpred.errors import AttnpredError, CacheFileError, ShapeError
from attnpred.hf.cache import TieredCache
from attnpred.hf.header import Header
from attnpred.hf.layer import TieredLayer
from attnpred.hf.modes import attending_dtype, in_ordinary_mode
from attnpred.hf.saving import TOKENS, WINDOW, check_value
from attnpred.policies import POLICIES
from attnpred.policies.base import Policy
from attnpred.policies.paper_cnn import PaperForecast
from attnpred.predictor.memory import inside
from attnpred.predictor.pretrained import Predictor
from attnpred.shapes import num_blocks
from attnpred.store.backing import Backing
from attnpred.store.safetensors_file import SafetensorsFile
from attnpred.store.saved import SavedTier
from attnpred.store.sealed import SealedBlocks

logger = logging.getLogger("attnpred")

HOST = torch.device("cpu")


@in_ordinary_mode
def load(
    path: str | Path,
    model: PreTrainedModel,
    *,
    prefix: Tensor | None = None,
    policy: Policy[Any] | None = None,
    predictor: Predictor | str | Path | None = None,
    **overrides: Any,
) -> TieredCache:
    """Return a cache that goes on where the saved one was; see `TieredCache.load`."""
    file, header = _open(Path(path).expanduser(), model)
    settings = header.settings_with(overrides)
    chosen = header.find_policy(policy, predictor, model.config, settings, file.path)
    return _begin(file, header, model, prefix, chosen, settings)


@in_ordinary_mode
def load_keys(
    path: str | Path, model: PreTrainedModel, prefix: Tensor, policy: Policy[Any], settings: CacheConfig
) -> TieredCache:
    """Return a cache of what `prefix` has in common with a saved one, for any policy and any settings but its block size.

    Keys and values are those that were saved. What a policy remembers is not: `policy` begins with the queries that come
    next, and sees the keys of all blocks then. It needs the last queries of a text (`last_queries`), so save such a cache so
    many tokens before the end. Raises `CacheFileError`.
    """
    file, header = _open(Path(path).expanduser(), model)
    if header.block_size != settings.block_size:
        raise CacheFileError(
            f"got {path} in blocks of {header.block_size}, expected {settings.block_size}: save it with that block size"
        )
    if header.policy not in POLICIES or POLICIES[header.policy].evicts:
        raise CacheFileError(f"got {path} of policy {header.policy}, expected one that keeps all blocks, such as full")
    return _begin(file, replace(header, decoders={}), model, prefix, policy, settings)


def _open(path: Path, model: PreTrainedModel) -> tuple[SafetensorsFile, Header]:
    """Return the file and what it says of itself, if this model made it. Raises `CacheFileError`."""
    file = SafetensorsFile(path)
    header = Header.from_metadata(file.metadata, path)
    header.require(model.config, attending_dtype(model.device, model.dtype), path)
    header.require_weights(model, path)
    return file, header


def _begin(
    file: SafetensorsFile,
    header: Header,
    model: PreTrainedModel,
    prefix: Tensor | None,
    policy: Policy[Any],
    settings: CacheConfig,
) -> TieredCache:
    """Return a cache of the file's tokens, or of those that it has in common with `prefix`."""
    if isinstance(policy, PaperForecast):
        policy.predictor.to(model.device)
    ids = None if header.tokens is None else _tensor(file, header, TOKENS, HOST)
    kept = header.length if prefix is None else _in_common(prefix, ids, header, file.path)
    if not kept:
        return _of(model, TieredCache(model.config, policy=policy, config=settings))
    cache = _of(model, TieredCache(model.config, policy=policy, config=settings, saved=SavedTier(file)))
    try:
        _fill(cache, file, header, model.device)
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        if isinstance(error, AttnpredError):
            raise
        # Its sums are right, so somebody wrote it that way.
        raise CacheFileError(
            f"got {file.path}, which no cache fits ({error!r}), expected one of `cache.save`"
        ) from error
    cache.tokens = ids
    if kept < header.length:
        cache.crop(kept - header.length)
    return cache


def _of(model: PreTrainedModel, cache: TieredCache) -> TieredCache:
    cache.model = weakref.ref(model)
    return cache


def _fill(cache: TieredCache, file: SafetensorsFile, header: Header, device: torch.device) -> None:
    """Give an empty cache what the file holds."""
    cache.saved_tokens = header.length
    if cache.settings.fast_limit is not None:  # nothing is in other memory yet
        cache.admit(header.length, header.batch, getattr(torch, header.dtype))
    plain = Backing(SavedTier(file), None, cache.settings.fetch_timeout)  # for blocks that come to fast memory for good
    for index, (layer, said) in enumerate(zip(cache.layers, header.layers, strict=True)):
        name = f"layers.{index}."
        if f"{name}keys" in header.sums:
            keys, values = (_tensor(file, header, name + part, device) for part in ("keys", "values"))
            if type(layer) is TieredLayer:
                backing = plain if cache.backing is None or cache.backing.codec != said["codec"] else cache.backing
                layer.lazy_initialization(keys, values)
                layer.store.adopt(_sealed(file, header, backing, index, keys, values), keys, values)
            else:
                if said["sliding_window"] != layer.sliding_window or type(said["record_past"]) is not bool:  # type: ignore[union-attr]
                    raise _damaged(f"{name}keys", file)
                _fill_window(layer, said, keys, values)
            if layer.get_seq_length() != header.length:  # type: ignore[union-attr]
                raise _damaged(f"{name}keys", file)
    for number, state in header.decoders.items():
        mine = f"decoders.{number}."
        tensors = {name: _tensor(file, header, name, device) for name in header.sums if name.startswith(mine)}
        decoder = cache.decoder(int(number))
        decoder.restore(state | inside(mine, tensors))
        own = cache.layers[int(number) : int(number) + 1]  # none where it shares the keys of another
        if decoder.left.kept is not None and own and type(own[0]) is TieredLayer:
            own[0].store.release(decoder.left.blocks(num_blocks(header.length, header.block_size)))


def _sealed(
    file: SafetensorsFile, header: Header, backing: Backing, index: int, keys: Tensor, values: Tensor
) -> SealedBlocks:
    """Return the full blocks of layer `index`, which stay where they are."""
    units, seals = f"layers.{index}.units", f"layers.{index}.checks"
    place, found, shape = file.place(units), file.tensor(seals), file.shape(units)
    if shape[:3] != found.shape or shape[:3] != (header.batch, header.length // header.block_size, keys.shape[1]):
        raise _damaged(seals, file)
    sealed = SealedBlocks.adopt(backing, header.block_size, keys, values, index, place, found)
    if shape[3:] != (sealed.codec.unit_bytes,):
        raise _damaged(units, file)
    return sealed


def _fill_window(layer: Any, said: dict[str, Any], keys: Tensor, values: Tensor) -> None:
    """Give a stock sliding layer what it had."""
    layer.lazy_initialization(keys, values)
    layer.keys, layer.values = keys, values
    for attribute in WINDOW:
        setattr(layer, attribute, said[attribute])


def _tensor(file: SafetensorsFile, header: Header, name: str, device: torch.device) -> Tensor:
    """Read a tensor at once. Raises `CacheFileError` if it is not the one that was saved."""
    tensor = file.tensor(name)
    if check_value(name, tensor) != header.sums.get(name):
        raise _damaged(name, file)
    return tensor.to(device)


def _damaged(name: str, file: SafetensorsFile) -> CacheFileError:
    return CacheFileError(
        f"got other bytes of {name!r} in {file.path} than were saved, expected them unchanged: save the cache again"
    )


def _in_common(prefix: Tensor, known: Tensor | None, header: Header, path: Path) -> int:
    """Return how many of the saved tokens serve for `prefix`: all that are the same, but never all of `prefix`."""
    ids = prefix[0] if prefix.ndim == 2 and prefix.shape[0] == 1 else prefix
    if ids.ndim != 1 or not ids.numel():
        raise ShapeError(f"got a prefix of shape {tuple(prefix.shape)}, expected (L,) or (1, L): give one sequence")
    if header.batch != 1 or known is None:
        got = "no tokens" if known is None else f"{header.batch} rows"
        raise CacheFileError(f"got {path} with {got}, expected the tokens of one row: save it with tokens=")
    longest = min(header.length, ids.numel())
    differs = (known[0, :longest] != ids[:longest].cpu()).nonzero()
    kept = min(int(differs[0]) if differs.numel() else longest, ids.numel() - 1)
    slid = any(said.get("cumulative_length", 0) >= said.get("sliding_window", 1) for said in header.layers)
    if kept < header.length and slid:
        logger.warning(
            "%s cannot be cut to %d tokens, because of its sliding layers: nothing of it is used", path, kept
        )
        return 0
    logger.info("%d of %d tokens are taken from %s", kept, ids.numel(), path)
    return kept
