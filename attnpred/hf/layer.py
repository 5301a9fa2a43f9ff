"""`TieredLayer`: one full-attention layer of a `TieredCache`. `attnpred.hf` says how its `update` is understood."""

import weakref
from typing import TYPE_CHECKING, Any, final

from torch import Tensor
from transformers.cache_utils import DynamicLayer

from attnpred import telemetry
from attnpred.errors import ConfigError
from attnpred.hf.gradients import without_gradient
from attnpred.hf.modes import attending_dtype, without_autocast
from attnpred.store.base import Store

if TYPE_CHECKING:
    from attnpred.hf.cache import TieredCache


SLIDING = "DynamicSlidingWindowLayer"
"""A stock layer by name: older transformers do not have all of them."""


def holds_tokens(layer: object) -> bool:
    """Return whether a layer of a cache has the keys and values of tokens, one for one."""
    return type(layer) is TieredLayer or type(layer).__name__ == SLIDING


@final
class TieredLayer(DynamicLayer):
    """Keys and values of one full-attention layer in a store; see `attnpred.hf` for `update`.

    They have one type of number, that of the first call's attention, whatever autocast makes of them later.
    """

    def __init__(self, store: Store, index: int) -> None:
        super().__init__()
        self.index, self.store = index, store
        self.returned: tuple[weakref.ref[Tensor], weakref.ref[Tensor]] | None = None
        self.is_awaited = False
        self.reason: str | None = None
        self.is_sparse = False
        self.is_prompt = False

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.device = key_states.device
        self.dtype = attending_dtype(self.device, key_states.dtype)
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, cache: "TieredCache", **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        batch, _, tokens, _ = key_states.shape
        self.is_prompt = self.store.length == 0
        if self.is_prompt:
            cache.admit(tokens, batch, self.dtype)
        key_states, value_states = key_states.to(self.dtype), value_states.to(self.dtype)
        with without_autocast(key_states.device):
            self.store.append(key_states.detach(), value_states.detach())
        self.reason = None if self.is_prompt else cache.dense_reason(self.index, tokens, self.store.length)
        self.is_sparse = not self.is_prompt and self.reason is None
        if self.reason == telemetry.NOT_ATTACHED:
            cache.decoder(self.index).counts.count_dense(self.reason, tokens, self.store.length, self.store.bytes())
        # Only stock attention needs everything at once; ours reads the store.
        keys, values = key_states, value_states
        if self.reason == telemetry.NOT_ATTACHED:
            keys, values = (without_gradient(x, key_states, value_states) for x in self.store.view())
        self.returned = weakref.ref(keys), weakref.ref(values)
        self.is_awaited = cache.is_attached
        return keys, values

    def has_returned(self, key: Tensor, value: Tensor) -> bool:
        """True where the last `update` returned these very tensors."""
        return self.returned is not None and self.returned[0]() is key and self.returned[1]() is value

    def get_seq_length(self) -> int:
        return self.store.length

    def get_max_length(self) -> int:
        return -1

    def get_max_cache_shape(self) -> int:
        """Older name of `get_max_length` (transformers before 5.21)."""
        return -1

    def reset(self) -> None:
        self.store.clear()
        self.returned = None
        self.is_initialized = False

    def crop(self, tokens_to_remove: int) -> None:
        self.store.crop(max(0, self.store.length + int(tokens_to_remove)))

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        if self.store.length:
            self.store.select(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.store.length:
            self.store.repeat(repeats)

    def offload(self) -> None:
        raise ConfigError(
            "got a request to offload a TieredCache layer, expected none: use DynamicCache(offloading=True) instead"
        )

    prefetch = offload
