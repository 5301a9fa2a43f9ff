"""Keys and values of some tokens of a cache, taken out as they are and given to another: what a prompt's beginning is worth.

They are those of a text that was read with full attention, so they serve every policy and budget. Only a cache whose layers
all hold every token has them: a sliding window has forgotten, a linear layer has mixed them up.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from attnpred.hf.cache import TieredCache
from attnpred.hf.layer import TieredLayer
from attnpred.hf.saving import NOTHING


def keeps_every_token(cache: TieredCache) -> bool:
    """Return whether `tokens_of` has all that a model needs to go on."""
    layers = [layer for layer in cache.layers if type(layer).__name__ != NOTHING]
    return cache.sharing is None and not cache.policy.evicts and all(type(layer) is TieredLayer for layer in layers)


def tokens_of(cache: TieredCache, start: int, stop: int) -> dict[str, Tensor]:
    """Return copies of the keys [Hkv, T, D] and values of tokens `start` to `stop` of the one row, layer by layer."""
    found = {}
    for index, layer in enumerate(cache.layers):
        if type(layer) is TieredLayer:
            keys, values = layer.store.view()
            found[f"{index}.keys"] = keys[0, :, start:stop].to("cpu", copy=True).contiguous()
            found[f"{index}.values"] = values[0, :, start:stop].to("cpu", copy=True).contiguous()
    return found


def give_tokens(cache: TieredCache, blocks: Sequence[Mapping[str, Tensor]], device: torch.device) -> None:
    """Add what `tokens_of` returned, successive parts of one text, to a cache that holds what is before them."""
    for index, layer in enumerate(cache.layers):
        if type(layer) is TieredLayer:
            keys, values = (
                torch.cat([block[f"{index}.{name}"] for block in blocks], 1)[None].to(device)
                for name in ("keys", "values")
            )
            if not layer.is_initialized:
                layer.lazy_initialization(keys, values)
            layer.store.append(keys, values)
    cache.tokens = None
