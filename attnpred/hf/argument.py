"""The argument that brings a model its cache. Its name has changed, so ours is given by the name that this version wants."""

from dataclasses import fields
from typing import Any

from transformers.cache_utils import Cache
from transformers.modeling_outputs import CausalLMOutputWithPast

from attnpred.errors import ConfigError

NAMES = ("cache", "past_key_values")
"""What it is called from transformers 5.24 on, and what it was called before."""

NAME = next(name for name in NAMES if name in {field.name for field in fields(CausalLMOutputWithPast)})
"""Its name in this version: an output has it too."""


def cache_argument(cache: Cache | None) -> dict[str, Any]:
    """Return the keyword argument that gives `cache` to a model or its `generate`: `model(ids, **cache_argument(cache))`."""
    return {NAME: cache}


def take_cache(kwargs: dict[str, Any]) -> Any:
    """Take the cache out of the arguments of a call, by whatever name it came. Raises `ConfigError` for two of them."""
    found = [cache for cache in (kwargs.pop(name, None) for name in NAMES) if cache is not None]
    if len(found) > 1:
        raise ConfigError(f"got both {NAMES[0]} and {NAMES[1]}, expected one cache: give it as {NAME}")
    return found[0] if found else None
