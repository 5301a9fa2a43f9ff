"""`attach`: switch the sparse path of a model on, for good or for a `with` block."""

import functools
import logging
import weakref
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, final

from torch import Tensor
from transformers import AttentionInterface, PreTrainedModel
from transformers.cache_utils import DynamicCache
from transformers.masking_utils import AttentionMaskInterface

from attnpred import telemetry
from attnpred.config import CacheConfig
from attnpred.errors import ConfigError, NotSparseError
from attnpred.hf.attention import attention, make_mask, model_noter, note_tokens
from attnpred.hf.cache import IMPLEMENTATION, TieredCache
from attnpred.hf.cache_argument import NAME, cache_argument, rename_cache, take_cache
from attnpred.hf.choose import attend_near, check_budgets, make_policy, make_settings, make_sharing
from attnpred.hf.support import is_served, refuse_model, refuse_unsupported
from attnpred.policies.base import Policy
from attnpred.policies.paper_cnn import PaperForecast
from attnpred.policies.pod import Pod
from attnpred.policies.predicted import Predicted
from attnpred.predictor.pretrained import Predictor

logger = logging.getLogger("attnpred")


@final
class Attached:
    """A model with the sparse path switched on; a context manager that switches it off again.

    `model.generate` gets a fresh `TieredCache` per call, unless the caller brings a cache of their own or rules one out.
    """

    def __init__(self, model: PreTrainedModel, make_cache: Callable[[], TieredCache], *, strict: bool) -> None:
        self._model, self._make_cache, self._strict = model, make_cache, strict
        self._caches: list[dict[int, telemetry.LayerCounts]] = []
        self._fast_bytes = 0
        self._slow_bytes: dict[str, int] = {}
        self._saved_bytes: int | None = None
        self._warned = False
        self._stock_implementation = model.config.get_text_config(decoder=True)._attn_implementation
        self._stock_generate: Callable[..., Any] = model.generate  # type: ignore[assignment]
        self._is_active = False

    def activate(self) -> "Attached":
        """Register attention and mask functions and wrap `generate`."""
        AttentionInterface.register(IMPLEMENTATION, attention)
        AttentionMaskInterface.register(IMPLEMENTATION, make_mask)
        self._model.set_attn_implementation(IMPLEMENTATION)
        self._hooks = [
            self._model.register_forward_pre_hook(rename_cache, with_kwargs=True),
            self._model.get_input_embeddings().register_forward_pre_hook(note_tokens),
            self._model.get_input_embeddings().register_forward_pre_hook(model_noter(self._model)),
        ]

        @functools.wraps(self._stock_generate)
        def generate(*args: Any, **kwargs: Any) -> Any:
            return self._generate(*args, **kwargs)

        self._model.generate = generate  # type: ignore[assignment]
        self._is_active = True
        return self

    def new_cache(self) -> TieredCache:
        """Return an empty cache with this handle's settings, for calls of the model outside `generate`."""
        return self._make_cache()

    def detach(self) -> None:
        """Give the model back as it was; a second call does nothing."""
        if self._is_active:
            self._is_active = False
            del self._model.generate
            for hook in self._hooks:
                hook.remove()
            self._model.set_attn_implementation(self._stock_implementation)

    def _generate(self, *args: Any, **kwargs: Any) -> Any:
        cache = take_cache(kwargs)
        implementation = self._setting("cache_implementation", args, kwargs)
        why = None
        if cache is not None:
            why = None if isinstance(cache, TieredCache) else f"{NAME} is another cache"
        elif self._setting("use_cache", args, kwargs) is False:
            why = "use_cache=False"
        elif implementation not in (None, "hybrid"):  # "hybrid" is an old default of the Hub, which `generate` ignores
            why = f"cache_implementation={implementation!r}"
        else:
            cache = self._make_cache()
            if self._setting("is_assistant", args, kwargs):
                cache.activate_past_recording()  # as `generate` does with a cache that it makes itself
        if why is not None:
            if self._strict:
                raise NotSparseError(f"got {why}, expected the sparse path (strict=True): leave it out")
            if not self._warned:
                logger.warning("%s: the sparse path is off for this call", why)
                self._warned = True
        if cache is not None:
            kwargs |= cache_argument(cache)
        if isinstance(cache, TieredCache):
            self._admit(cache, args, kwargs)
        try:
            result = self._stock_generate(*args, **kwargs)
        finally:
            if isinstance(cache, TieredCache):
                self._remember(cache)
        if isinstance(cache, TieredCache):
            cache.tokens = self._tokens_in(cache, result, args, kwargs)
        return result

    def _tokens_in(
        self, cache: TieredCache, result: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Tensor | None:
        """Return the ids of what the cache holds after a call, or None: beams end in another order than their rows."""
        ids = getattr(result, "sequences", result)
        length, beams = cache.get_seq_length(), self._setting("num_beams", args, kwargs) or 1
        if not isinstance(ids, Tensor) or beams > 1 or kwargs.get("inputs_embeds") is not None or ids.shape[1] < length:
            return None
        return ids[:, :length].cpu()

    def _admit(self, cache: TieredCache, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Refuse a call whose last token would not fit, before its first one. Raises `TierFullError`."""
        given = [*args[:1], *(kwargs.get(name) for name in ("inputs", "input_ids", "inputs_embeds"))]
        prompt = next((tensor for tensor in given if tensor is not None), None)
        if prompt is None:
            return
        tokens = max(prompt.shape[1], cache.get_seq_length())
        new, longest = (self._setting(name, args, kwargs) for name in ("max_new_tokens", "max_length"))
        tokens = max(tokens, longest or 0) if new is None else tokens + new
        copies = [self._setting(name, args, kwargs) or 1 for name in ("num_beams", "num_return_sequences")]
        cache.admit(tokens, prompt.shape[0] * max(copies), self._model.dtype)

    def _setting(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Return what `generate(*args, **kwargs)` goes by: its argument, else its generation config's, else the model's."""
        given = kwargs.get("generation_config", args[1] if len(args) > 1 else None)
        found = [kwargs.get(name), getattr(given, name, None), getattr(self._model.generation_config, name, None)]
        return next((value for value in found if value is not None), None)

    def _remember(self, cache: TieredCache) -> None:
        counts = {index: decoder.counts for index, decoder in cache.decoders.items()}
        known = {id(count) for earlier in self._caches for count in earlier.values()}
        if not known & {id(count) for count in counts.values()}:
            self._caches.append(counts)
        self._fast_bytes = max(self._fast_bytes, cache.fast_bytes())
        if cache.sharing is not None:
            self._saved_bytes = max(self._saved_bytes or 0, cache.sharing.saved_bytes())
        slow = {} if cache.backing is None else cache.backing.tier.used()
        self._slow_bytes |= {kind: max(size, self._slow_bytes.get(kind, 0)) for kind, size in slow.items()}

    def stats(self) -> dict[str, Any]:
        """Return the counters of all `generate` calls so far, per layer and in all; bytes held are those of the largest."""
        indices = sorted({index for counts in self._caches for index in counts})
        result = telemetry.report([telemetry.total([c[i] for c in self._caches if i in c]) for i in indices], indices)
        result["fast_bytes"] = self._fast_bytes
        if self._saved_bytes is not None:
            result["saved_bytes"] = self._saved_bytes
        return result | ({"slow_bytes": dict(self._slow_bytes)} if self._slow_bytes else {})

    def reset_stats(self) -> None:
        """Forget the counters of earlier calls."""
        self._caches = []
        self._fast_bytes, self._slow_bytes, self._saved_bytes = 0, {}, None

    def __enter__(self) -> "Attached":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.detach()


def attach(
    model: PreTrainedModel,
    budget: int | float | None = None,
    *,
    policy: str | Policy[Any] = "predicted",
    config: CacheConfig | None = None,
    predictor: Predictor | str | Path | None = None,
    **overrides: Any,
) -> Attached:
    """Switch the sparse path of `model` on, for good or for a `with` block, and return the handle.

    budget: tokens, or a share of the context up to 1 (see `CacheConfig`); config and overrides: all other settings;
    policy: a name of `attnpred info`, or an instance; predictor: a `Predictor`, a folder or a Hub id.
    Raises `UnsupportedModelError` and `ConfigError` before the first token.

    Example:
        with attnpred.attach(model, budget=1024) as attached:
            model.generate(**inputs)
            attached.stats()["total"]["tokens_attended"]
    """
    if "generate" in vars(model):
        raise ConfigError(
            f"got a {type(model).__name__} that is attached already, expected a free one: call detach() on the earlier handle"
        )
    refuse_unsupported(model.config)
    refuse_model(model)
    if budget is not None:
        overrides["budget"] = budget
    settings = make_settings(config, overrides)
    check_budgets(model.config, settings)
    chosen = make_policy(policy, predictor, model.config, settings)
    settings = attend_near(settings, chosen)
    if make_sharing(model.config, settings, chosen) is None and isinstance(chosen, Pod):
        logger.warning("got policy 'pod' without layer_groups: no keys are shared, and every step is dense")
    if isinstance(chosen, Predicted | PaperForecast):
        chosen.predictor.to(model.device)
    if not any(is_served(layer) for layer in DynamicCache(config=model.config).layers):
        why = f"{model.config.model_type} has no full-attention layer: there is nothing to compress"
        if settings.strict:
            raise NotSparseError(f"got strict=True, but {why}")
        logger.warning(why)

    def make_cache() -> TieredCache:
        cache = TieredCache(model.config, policy=chosen, settings=settings)
        cache.model = weakref.ref(model)
        return cache

    return Attached(model, make_cache, strict=settings.strict).activate()
