"""From a model's config to what its cache takes (`attnpred.store.estimate`), without weights and without a prompt.

Heads and dimensions are in the config, layer by layer where layers differ. How much a policy remembers is in no table: its
own memory is asked. It is fed two short contexts of random keys, in the order of a decode step, and since all that it keeps
is kept per block, two sizes tell what any context takes.
"""

from dataclasses import replace
from typing import Any

import torch
from transformers import PreTrainedConfig
from transformers.cache_utils import DynamicCache

from attnpred.config import CacheConfig
from attnpred.errors import UnsupportedModelError
from attnpred.hf.modes import without_autocast
from attnpred.hf.support import is_served, refuse_unsupported
from attnpred.policies.base import Policy, View
from attnpred.policies.select import zone_at
from attnpred.store.estimate import Estimate, LayerShape, estimate

STRIDE = 8
"""By how many blocks the two contexts differ."""


def estimate_for(
    model_config: PreTrainedConfig,
    settings: CacheConfig,
    policy: Policy[Any],
    dtype: torch.dtype,
    tokens: int,
    batch: int = 1,
) -> Estimate:
    """Return what the cache of this model takes at a context of `tokens` in each of `batch` rows, in bytes."""
    settings = policy.settle(settings)
    shapes = layer_shapes(model_config, settings, policy, dtype, tokens, batch)
    return estimate(settings, shapes, tokens, batch)


def layer_shapes(
    model_config: PreTrainedConfig,
    settings: CacheConfig,
    policy: Policy[Any],
    dtype: torch.dtype,
    tokens: int,
    batch: int = 1,
) -> list[LayerShape]:
    """Return the full-attention layers, whose keys and values are numbers of `dtype`; the others stay as they are.

    Raises `UnsupportedModelError` for a model that cannot be served.
    """
    text = model_config.get_text_config(decoder=True)
    refuse_unsupported(text)
    shapes = []
    layers = DynamicCache(config=model_config).layers
    choosing = [i for i, layer in enumerate(layers) if is_served(layer) and not settings.is_dense_layer(i)]
    for index, layer in enumerate(layers):
        if is_served(layer):
            is_dense = policy.is_dense or settings.is_dense_layer(index)
            one = _shape(text.per_layer_config[index], dtype.itemsize, is_dense)
            follows = policy.leader(index, choosing) != index
            memory = (
                0 if is_dense or follows else memory_bytes(settings.for_layer(index), policy, index, one, dtype, tokens)
            )
            shapes.append(replace(one, memory_bytes=memory * batch, index=index))
    return shapes


def memory_bytes(
    settings: CacheConfig, policy: Policy[Any], index: int, layer: LayerShape, dtype: torch.dtype, tokens: int
) -> int:
    """Return what the policy remembers of layer `index` for one row at a context of `tokens`, in bytes."""
    # a memory is fed from H tokens before the context outgrows the budget (`LayerDecoder.observe`)
    if settings.dense_when_fits and zone_at(settings, tokens + settings.history).covers_all:
        return 0
    full, rest = divmod(tokens, settings.block_size)
    blocks = settings.smallest_budget // settings.block_size + STRIDE  # enough of them between sinks and recent window
    with without_autocast(torch.device("cpu")):  # as where the memory is used
        small, large = (
            _remembered(settings, policy, index, layer, dtype, count, rest) for count in (blocks, blocks + STRIDE)
        )
    return max(0, small + (large - small) * (full - blocks) // STRIDE)


@torch.no_grad()
def _remembered(
    settings: CacheConfig,
    policy: Policy[Any],
    index: int,
    layer: LayerShape,
    dtype: torch.dtype,
    full: int,
    rest: int,
) -> int:
    """Return the bytes of a memory that has seen `full` whole blocks and `rest` tokens more."""
    memory = policy.memory(settings, index)
    zone = zone_at(settings, full * settings.block_size + rest)
    selecting = layer.kv_heads * (layer.group if settings.per_query_head or settings.union else 1)
    # random, because some memories measure their keys: nothing can be learned from zeros
    random = torch.Generator().manual_seed(0)
    keys = torch.randn(
        1,
        layer.kv_heads,
        full * settings.block_size,
        layer.key_dim,
        generator=random,
        dtype=torch.float32,
        device="cpu",
    )
    query = torch.randn(
        1, layer.kv_heads * layer.group, layer.key_dim, generator=random, dtype=torch.float32, device="cpu"
    )
    row = torch.full((1, selecting, zone.blocks), 1 / zone.blocks, dtype=torch.float32, device="cpu")
    if memory.sealed >= 0:
        memory.seal(keys.to(dtype))
    if memory.rows:
        memory.push(row[:, :, None].expand(-1, -1, memory.rows, -1))
    memory.look(query.to(dtype), layer.key_dim**-0.5, selecting)
    memory.read(torch.zeros(1, zone.length, dtype=torch.int64, device="cpu"), zone.length)
    if not memory.is_empty:
        # some keep what they computed for a score
        probe = torch.zeros(1, query.shape[1], 1, dtype=torch.float32, device="cpu")
        policy.score(View(memory, zone, index, True, lambda: row, lambda ids: probe.expand(1, -1, ids.shape[2])))
    return memory.bytes()


def _shape(config: Any, item_bytes: int, is_dense: bool) -> LayerShape:
    """Return the shape of the layer whose own config this is."""
    heads = config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    key_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    value_dim = getattr(config, "v_head_dim", None) or key_dim
    if key_dim < 1 or heads % kv_heads:
        raise UnsupportedModelError(
            f"got {heads} heads, {kv_heads} kv heads and {key_dim} channels each, expected whole groups of at least one channel"
        )
    return LayerShape(kv_heads, key_dim, value_dim, item_bytes, heads // kv_heads, is_dense=is_dense)
