"""What is left of a cache that was closed: every use of it is an error, never a context that is empty without a word.

`TieredCache.close` takes nothing away from a step that runs in another thread: it puts a `ClosedLayer` in the place of each
layer, and new decoders in the place of those that were. What the step holds, it holds until its next call of the cache,
which is refused; then nobody holds it any more, and the memory is free.
"""

from typing import NoReturn, final

from transformers.cache_utils import DynamicLayer

from attnpred.errors import closed_cache


@final
class ClosedLayer(DynamicLayer):
    """In the place of any layer, and by its type a layer of attention; whatever is asked of it is a `StoreError`."""

    def __init__(self) -> None:
        pass

    def __getattribute__(self, name: str) -> NoReturn:
        raise closed_cache()
