"""`TieredCache`: the cache of one sequence (or batch), all of its state, and the only thing that is passed around."""

import copy
import logging
import os
import weakref
from contextvars import ContextVar
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn, final

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache

from attnpred import telemetry
from attnpred.config import CacheConfig
from attnpred.decode import LayerDecoder
from attnpred.errors import NotSparseError, StoreError, UnsupportedModelError, closed_cache, forked_cache
from attnpred.hf.call import CALL
from attnpred.hf.choose import attend_near, check_budgets, described, make_policy, make_settings, make_sharing
from attnpred.hf.closed import ClosedLayer
from attnpred.hf.layer import TieredLayer, holds_tokens
from attnpred.hf.modes import in_ordinary_mode
from attnpred.hf.operations import Operations
from attnpred.hf.sizes import estimate_for
from attnpred.hf.stores import new_store
from attnpred.hf.support import is_served, prefix_error, refuse_unsupported
from attnpred.policies.base import Policy
from attnpred.predictor.pretrained import Predictor
from attnpred.store import estimate
from attnpred.store.backing import open_backing
from attnpred.store.base import Store
from attnpred.store.scratch import absolute
from attnpred.store.tier import Tier

logger = logging.getLogger("attnpred")

IMPLEMENTATION = "attnpred"
"""The name under which the attention function is registered with transformers."""

LAST_UPDATED: ContextVar["weakref.ref[Cache] | None"] = ContextVar("attnpred_last_updated", default=None)
"""The cache that was updated last in this thread; the attention function that follows looks there for its layer.

A `TieredCache`, or several as rows (`attnpred.hf.rows`)."""


@final
class TieredCache(Operations):
    """The cache of one `generate` call, or of a conversation: `model.generate(..., cache=cache)`.

    Before transformers 5.24 the argument is called `past_key_values`; an attached model takes either name.
    The model must be attached (`attach`); otherwise every step is dense, correct, and counted as a fallback.

    Example:
        with attnpred.attach(model):
            cache = attnpred.TieredCache(model.config, budget=1024)
            model.generate(**inputs, cache=cache)
            cache.save("document.kv")  # and later, or elsewhere: TieredCache.load("document.kv", model)

    model_config: the model's; config and overrides: settings, as `attach` takes them; saved: a file below the slow tier,
    for `load`.
    """

    @in_ordinary_mode
    def __init__(
        self,
        model_config: PreTrainedConfig,
        *,
        policy: str | Policy[Any] = "predicted",
        config: CacheConfig | None = None,
        predictor: Predictor | str | Path | None = None,
        saved: Tier | None = None,
        **overrides: Any,
    ) -> None:
        self.model_config = model_config.get_text_config(decoder=True)
        refuse_unsupported(self.model_config)
        self.settings = make_settings(config, overrides)
        self.policy = make_policy(policy, predictor, self.model_config, self.settings)
        check_budgets(self.model_config, self.settings)
        self.settings = attend_near(self.policy.settle(self.settings), self.policy)
        self.sharing = make_sharing(self.model_config, self.settings, self.policy)
        self.backing = None
        if self.settings.offload is not None:
            self.backing = open_backing(self.settings, pin=torch.cuda.is_available(), saved=saved)
            self.backing.users.add(self)
        self.counts: dict[int, telemetry.LayerCounts] = {}
        stock = DynamicCache(config=model_config).layers
        super().__init__(
            layers=[
                TieredLayer(self._new_store(index), index) if is_served(layer) else layer
                for index, layer in enumerate(stock)
            ]
        )
        self._first = next((index for index, layer in enumerate(self.layers) if holds_tokens(layer)), -1)
        self.decoders: dict[int, LayerDecoder] = {}
        self.tokens: Tensor | None = None
        """Ids [B, L] of what it holds, where they are known: after `generate` of an attached model, and when loaded."""
        self.saved_tokens = 0
        """Tokens of a row whose blocks lie in the file that it was loaded from."""
        self.model: weakref.ref[PreTrainedModel] | None = None
        """The model that computed what it holds, where that is known: `save` marks its weights."""
        self._admitted = 0
        self._warned = False
        self._is_closed = False
        self._process = os.getpid()

    def require_usable(self) -> None:
        """Raise `StoreError` if it was closed, or has a slow tier and is used in another process than its own."""
        if self._is_closed:
            raise closed_cache()
        if self.backing is not None and self._process != os.getpid():
            raise forked_cache(self._process, os.getpid())

    def _new_store(self, index: int) -> Store:
        if self.sharing is not None:
            return self.sharing.new_store(index)
        return new_store(index, self.model_config, self.settings, self.policy, self.backing, self._counts(index))

    def _counts(self, index: int) -> telemetry.LayerCounts:
        return self.counts.setdefault(index, telemetry.LayerCounts())

    def decoder(self, index: int) -> LayerDecoder:
        """Return the decoder of attention layer `index`, made at its first use."""
        self.require_usable()
        if index not in self.decoders:
            choosing = [i for i, layer in enumerate(self.layers) if type(layer) is TieredLayer]
            leader = self.policy.leader(index, [i for i in choosing if not self.settings.is_dense_layer(i)])
            memory = None if leader == index else self.decoder(leader).memory
            self.decoders[index] = LayerDecoder(self.settings, self.policy, self._counts(index), index, memory)
        return self.decoders[index]

    def admit(self, tokens: int, batch: int = 1, dtype: torch.dtype | None = None) -> None:
        """Raise `TierFullError` if a context of `tokens` in each of `batch` rows is more than a tier may or can hold."""
        settings = self.settings
        is_limited = (settings.fast_limit, settings.host_limit, settings.disk_limit) != (None, None, None)
        if tokens * batch <= self._admitted or not (is_limited or settings.offload):
            return
        self._admitted = tokens * batch
        kind: Any = dtype or self.model_config.dtype or torch.float32
        wanted = estimate_for(self.model_config, settings, self.policy, kind, tokens, batch)
        if self.saved_tokens:
            new = max(0, tokens - self.saved_tokens)
            wanted = replace(wanted, host=wanted.host * new // tokens, disk=wanted.disk * new // tokens)
        folder = absolute(None if settings.offload_dir is None else Path(settings.offload_dir))
        estimate.admit(
            settings,
            wanted,
            estimate.free_host_bytes() if wanted.host else None,
            estimate.free_disk_bytes(folder) if wanted.disk else None,
        )

    @in_ordinary_mode
    def save(self, path: str | Path, tokens: Tensor | None = None, *, model: PreTrainedModel | None = None) -> None:
        """Write the cache to a file, all of it or nothing: keys, values, marks of the weights, what the policy remembers.

        tokens [B, L]: ids of all that it has seen, for `load(prefix=)`; `generate` of an attached model notes them itself.
        model: the one that computed the keys, where it was not attached, or called with embeddings alone.
        Raises `CacheFileError`, and `StoreError` if a block cannot be read back.
        """
        from attnpred.hf.saving import save  # which needs this class

        save(self, path, tokens, model)

    @classmethod
    def load(
        cls,
        path: str | Path,
        model: PreTrainedModel,
        *,
        prefix: Tensor | None = None,
        policy: Policy[Any] | None = None,
        predictor: Predictor | str | Path | None = None,
        **overrides: Any,
    ) -> "TieredCache":
        """Return a cache that goes on exactly where the saved one was; its blocks are read when they are needed.

        prefix: token ids [L] or [1, L] that are to be continued: what they have in common with those of the saved cache is
        kept, the rest of it cut off, so that `model.generate(prefix, cache=cache)` computes what is new alone.
        policy, predictor: those it was saved with, where they do not come with attnpred. overrides: settings on which
        nothing saved depends: `offload`, `offload_dir`, limits, `fetch_timeout`, `late_share`, `measure_recovery`, `strict`.
        Raises `CacheFileError` for a file that is damaged, or was saved with another model, dtype or predictor.
        """
        from attnpred.hf.loading import load  # which needs this class

        return load(path, model, prefix=prefix, policy=policy, predictor=predictor, **overrides)

    def fork(self) -> "TieredCache":
        """Return a second cache that goes on from here by itself: for several questions about one text.

        With `offload` the two share the blocks in the slow tier, and each has fast memory of its own; without, nothing is
        copied before one of them gets its next token.
        """
        return copy.deepcopy(self)

    @in_ordinary_mode
    def close(self) -> None:
        """Free all memory, and the file if there is one and no fork uses it; every later use but `stats` is a `StoreError`.

        A step that runs in another thread is stopped at its next layer.
        """
        if self._is_closed:
            return
        self._is_closed = True
        self.layers = [ClosedLayer() for _ in self.layers]
        if self.sharing is not None:
            self.sharing.close()
        # With the counts of before, and empty memories.
        self.decoders = {i: LayerDecoder(self.settings, self.policy, self._counts(i), i) for i in self.decoders}
        self._forget()
        if self.backing is not None:
            self.backing.close(self)

    def __enter__(self) -> "TieredCache":
        self.require_usable()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def max_cache_len(self) -> NoReturn:
        """Asked for by PEFT's prefix tuning alone, which then puts another cache in the place of this one."""
        raise prefix_error("prefix tuning")

    @property
    def is_attached(self) -> bool:
        """True where the model's attention is the function of this module."""
        return bool(self.model_config._attn_implementation == IMPLEMENTATION)

    def dense_reason(self, index: int, tokens: int, length: int) -> str | None:
        """Return why a later call of `tokens` tokens, to a length of `length`, must be dense; None if it need not."""
        if not self.is_attached:
            # all of an offloaded cache need not fit anywhere, and layers that share keys have not got all of them
            if self.settings.strict or self.backing is not None or self.sharing is not None:
                raise NotSparseError(
                    "got a model that is not attached, expected the sparse path: run inside attnpred.attach(model)"
                )
            if not self._warned:
                logger.warning(
                    "the model is not attached: this cache works, but every step is dense (use attnpred.attach)"
                )
                self._warned = True
            return telemetry.NOT_ATTACHED
        if self.settings.is_dense_layer(index):
            return telemetry.DENSE_LAYER
        if self.policy.is_dense:
            return telemetry.DENSE_POLICY
        if tokens > 1:
            return telemetry.SEVERAL
        return telemetry.FITS if self.decoder(index).fits(length) else None

    @in_ordinary_mode
    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        if layer_idx == self._first:
            self.begin_call()
        else:
            self.require_usable()
        LAST_UPDATED.set(weakref.ref(self))
        if type(self.layers[layer_idx]) is TieredLayer:
            kwargs["cache"] = self
        keys, values = super().update(key_states, value_states, layer_idx, *args, **kwargs)
        return keys, values

    def begin_call(self) -> None:
        """A call of the model begins, which adds tokens. Raises `StoreError`."""
        self.require_usable()
        self.require_whole()
        self._note_model()
        self.tokens = None  # it holds more now

    def _note_model(self) -> None:
        """Note which attached model it is that updates the cache, for `save`."""
        call = CALL.get()
        model = None if call is None or call.model is self.model else call.model()
        if call is not None and model is not None and model.config.get_text_config(decoder=True) is self.model_config:
            self.model = call.model

    def layer_of(self, index: int, key: Tensor, value: Tensor) -> TieredLayer | None:
        """Return the layer whose `update` returned these very tensors: layer `index`, or one that it shares keys with.

        Raises `UnsupportedModelError` if layer `index` was updated, and something else is attended to.
        """
        self.require_usable()
        own = self.layers[index] if 0 <= index < len(self.layers) else None
        for layer in (own, *self.layers):  # its own, nearly always
            if type(layer) is TieredLayer and layer.has_returned(key, value):
                layer.is_awaited = False
                return layer
        if type(own) is TieredLayer and own.is_awaited:
            own.is_awaited = False
            name = self.model_config.model_type
            raise UnsupportedModelError(
                f"got {name}, which changes keys or values after they are cached: run it without attnpred"
            )
        return None

    @in_ordinary_mode
    def __deepcopy__(self, memo: dict[int, Any]) -> "TieredCache":
        """Copy the sequence; policy and model config stay shared (the config tells whether the model is attached)."""
        self.require_usable()
        memo |= {id(shared): shared for shared in (self.model_config, self.settings, self.policy, self.backing)}
        copied = memo[id(self)] = object.__new__(TieredCache)
        if self.backing is not None:
            self.backing.users.add(copied)
        vars(copied).update(copy.deepcopy(vars(self), memo))
        self.require_usable()  # all of it was copied before another thread closed it
        return copied

    def __copy__(self) -> "TieredCache":
        """A copy with the same layers would be one cache under two names, and wrong in both."""
        return self.fork()

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        raise StoreError("got a cache to pickle, expected cache.save(path): TieredCache.load(path, model) reads it")

    def __repr__(self) -> str:
        """Say what it does and holds, without waiting for anything."""
        held = "closed" if self._is_closed else f"{self.get_seq_length()} tokens"
        return f"TieredCache({described(self.policy, self.settings)}, {held})"

    def stats(self) -> dict[str, Any]:
        """Return counters per layer and in all (see `attnpred.telemetry`); averages are per decode step."""
        result = telemetry.report([self.decoders[i].counts for i in sorted(self.decoders)], sorted(self.decoders))
        result["fast_bytes"] = self.fast_bytes()
        if self.sharing is not None:
            result["saved_bytes"] = self.sharing.saved_bytes()
        if self.backing is not None:
            result["slow_bytes"] = self.backing.tier.used()
        return result

    def fast_bytes(self) -> int:
        """Bytes of fast memory that keys and values, their tables and the policy's memory take now."""
        stores = sum(layer.store.fast_bytes() for layer in self.layers if type(layer) is TieredLayer)
        return stores + sum(int(decoder.memory.bytes()) for decoder in self.decoders.values())
