"""Long-context decoding for transformers models, with a small part of the KV cache in fast memory.

The public names, pinned by a test. Importing the package loads neither torch nor transformers: a name that needs them
is looked up when it is first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from attnpred.config import CacheConfig
from attnpred.errors import AttnpredError

if TYPE_CHECKING:
    from attnpred.hf import TieredCache, attach, load_model
    from attnpred.policies.base import Policy
    from attnpred.predictor.pretrained import Predictor

    __version__: str

__all__ = [
    "AttnpredError",
    "CacheConfig",
    "Policy",
    "Predictor",
    "TieredCache",
    "__version__",
    "attach",
    "load_model",
]

_HOMES = {
    "Policy": "attnpred.policies.base",
    "Predictor": "attnpred.predictor.pretrained",
    "TieredCache": "attnpred.hf",
    "attach": "attnpred.hf",
    "load_model": "attnpred.hf",
}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        value: Any = version("attnpred")
    elif name in _HOMES:
        value = getattr(import_module(_HOMES[name]), name)
    else:
        raise AttributeError(f"module 'attnpred' has no attribute {name!r}")
    globals()[name] = value  # the next look-up does not come here
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
