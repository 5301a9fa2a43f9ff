"""Which layers and models can be served. What cannot is refused by name, before the first token."""

from transformers import PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import DynamicCache, DynamicLayer

from attnpred.errors import UnsupportedModelError

UNDERSTOOD = ("DynamicLayer", "DynamicSlidingWindowLayer", "DummyLayer")
"""Cache layers that hold plain keys and values, or none; by name, because older transformers do not have all of them."""


OWN_CACHE = ("minimax",)
"""Models that take no cache but one of their own, although its layers hold plain keys and values."""

WITHOUT_FLAG = ("bamba", "biogpt", "jamba", "nemotron_h", "qwen3_5_text", "qwen3_next", "stablelm")
"""Models whose attention can be replaced, although their classes do not say so; the tests of families run all of them."""


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
    if name in OWN_CACHE:
        raise UnsupportedModelError(
            f"got {name}, which takes no cache but its own, expected a model that takes another: run it without attnpred"
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


PREFIXED = ("PREFIX_TUNING", "CARTRIDGE")
"""Adapters of PEFT that begin every text with keys and values of their own, in a cache that takes the place of ours."""


def prefix_error(kind: str) -> UnsupportedModelError:
    """Return the error for an adapter of one of the kinds `PREFIXED`."""
    return UnsupportedModelError(
        f"got {kind} of PEFT, which brings a cache of its own, expected a model or an adapter without one: run it without attnpred"
    )


def refuse_model(model: PreTrainedModel) -> None:
    """Raise `UnsupportedModelError`, by name, for a model whose attention or cache cannot be replaced."""
    adapter = str(getattr(getattr(model, "active_peft_config", None), "peft_type", "")).rpartition(".")[2]
    if adapter in PREFIXED:
        raise prefix_error(adapter)
    text = model.config.get_text_config(decoder=True)
    if not getattr(model, "_supports_attention_backend", False) and text.model_type not in WITHOUT_FLAG:
        raise UnsupportedModelError(
            f"got {type(model).__name__}, which does not let its attention be replaced, expected one that does: run it without attnpred"
        )
