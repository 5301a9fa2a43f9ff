"""The only folder that knows transformers: a cache, an attention function, and `attach`.

How they meet. `TieredCache` holds one `TieredLayer` per full-attention layer; sliding, linear and other layers stay
stock. A layer's `update` stores the new keys and values and decides, from the cache's own state, what this call is:

* the first call is the prompt; a later call of several tokens is a chunk, a second turn or a verification: both dense;
* a call of one token on a filled layer is a decode step: sparse, unless everything fits the budget anyway.

`update` returns the new keys and values alone; for a call with a past the attention function reads the layer's store. It
recognises the layer by the very tensor that `update` returned, so nothing is hung on modules or passed through
`generate`, layers that share another layer's keys (Gemma) are served by that layer's store, and whatever else runs on
the model takes the stock path. A model that changes keys or values after `update` is refused at its first call, because
what it attends to is not what is stored. Mask sizes stay full, so padding masks stay right.

A name is looked up when it is first used, so that what needs no model, such as the list of named ones, loads no torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from attnpred.hf.argument import cache_argument
    from attnpred.hf.attaching import attach
    from attnpred.hf.cache import IMPLEMENTATION, TieredCache
    from attnpred.hf.carry import carry_over, is_carried, last_queries
    from attnpred.hf.choose import fingerprint, make_policy, make_settings
    from attnpred.hf.handle import Attached
    from attnpred.hf.header import made_by
    from attnpred.hf.layer import TieredLayer
    from attnpred.hf.load import load_model, source_of, text_streamer
    from attnpred.hf.loading import load_keys
    from attnpred.hf.named_models import DEMO_MODEL
    from attnpred.hf.packing import Packing, pack_weights
    from attnpred.hf.sizes import estimate_for
    from attnpred.hf.support import refuse_unsupported

__all__ = [
    "DEMO_MODEL",
    "IMPLEMENTATION",
    "Attached",
    "Packing",
    "TieredCache",
    "TieredLayer",
    "attach",
    "cache_argument",
    "carry_over",
    "estimate_for",
    "fingerprint",
    "is_carried",
    "last_queries",
    "load_keys",
    "load_model",
    "made_by",
    "make_policy",
    "make_settings",
    "pack_weights",
    "refuse_unsupported",
    "source_of",
    "text_streamer",
]

_HOMES = {
    "attach": "attaching",
    "IMPLEMENTATION": "cache",
    "TieredCache": "cache",
    "cache_argument": "argument",
    "carry_over": "carry",
    "is_carried": "carry",
    "last_queries": "carry",
    "fingerprint": "choose",
    "make_policy": "choose",
    "make_settings": "choose",
    "Attached": "handle",
    "made_by": "header",
    "TieredLayer": "layer",
    "load_model": "load",
    "source_of": "load",
    "text_streamer": "load",
    "load_keys": "loading",
    "DEMO_MODEL": "named_models",
    "Packing": "packing",
    "pack_weights": "packing",
    "estimate_for": "sizes",
    "refuse_unsupported": "support",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'attnpred.hf' has no attribute {name!r}")
    value = getattr(import_module(f"attnpred.hf.{_HOMES[name]}"), name)
    globals()[name] = value  # the next look-up does not come here
    return value
