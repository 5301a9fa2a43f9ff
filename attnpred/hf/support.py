"""Which layers and models can be served. What cannot is refused by name, before the first token."""

from transformers import PreTrainedConfig
from transformers.cache_utils import DynamicCache, DynamicLayer

from attnpred.errors import UnsupportedModelError

UNDERSTOOD = ("DynamicLayer", "DynamicSlidingWindowLayer", "DummyLayer")
"""Cache layers that hold plain keys and values, or none; by name, because older transformers do not have all of them."""


def is_served(layer: object) -> bool:
    """Return whether a stock cache layer is one of full attention, which a `TieredLayer` replaces."""
    return type(layer) is DynamicLayer


def refuse_unsupported(config: PreTrainedConfig) -> None:
    """Raise `UnsupportedModelError`, by name, for a model whose cache holds something else than keys and values."""
    name = config.model_type
    if getattr(config, "is_encoder_decoder", False):
        raise UnsupportedModelError(
            f"got {name}, an encoder-decoder model, expected a decoder-only one: run it without attnpred"
        )
    if getattr(config, "kv_lora_rank", None) is not None:
        raise UnsupportedModelError(
            f"got {name}, whose cache holds latent vectors, expected keys and values: run it without attnpred"
        )
    for layer in DynamicCache(config=config).layers:
        if isinstance(layer, DynamicLayer) and type(layer).__name__ not in UNDERSTOOD:
            raise UnsupportedModelError(
                f"got {name} with cache layers of type {type(layer).__name__}, which cannot be served: run it without attnpred"
            )
