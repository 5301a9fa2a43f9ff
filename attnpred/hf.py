"""The only file that knows transformers: a cache, an attention function, and `attach`.

How they meet. `TieredCache` holds one `TieredLayer` per full-attention layer; sliding, linear and other layers stay
stock. A layer's `update` stores the new keys and values and decides, from the cache's own state, what this call is:

* the first call is the prompt; a later call of several tokens is a chunk, a second turn or a verification: both dense;
* a call of one token on a filled layer is a decode step: sparse, unless everything fits the budget anyway.

For a dense call `update` returns all keys and values, for a sparse one only the new ones. The attention function then
recognises the layer by the very tensor that `update` returned, so nothing is hung on modules or passed through
`generate`, layers that share another layer's keys (Gemma) are served by that layer's store, and whatever else runs on
the model takes the stock path. A model that changes keys or values after `update` is refused at its first call, because
what it attends to is not what is stored. Mask sizes stay full, so padding masks stay right.
"""

import copy
import functools
import logging
import weakref
from collections.abc import Callable
from contextvars import ContextVar
from pathlib import Path
from types import TracebackType
from typing import Any, final

import torch
from torch import Tensor, nn
from transformers import (
    AttentionInterface,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    TextStreamer,
)
from transformers.cache_utils import Cache, DummyLayer, DynamicCache, DynamicLayer, DynamicSlidingWindowLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from attnpred import telemetry
from attnpred.config import CacheConfig
from attnpred.decode import LayerDecoder
from attnpred.errors import ConfigError, NotSparseError, UnsupportedModelError
from attnpred.kernels.dense import AttentionTerms, dense_attention
from attnpred.policies import POLICIES
from attnpred.policies.base import Policy
from attnpred.policies.predicted import Predicted
from attnpred.predictor.pretrained import Predictor, shipped
from attnpred.store.pool import BlockPool

logger = logging.getLogger("attnpred")

IMPLEMENTATION = "attnpred"
DEMO_MODEL = Path(__file__).parent / "assets" / "demo_lm"

_updated: ContextVar["weakref.ref[TieredCache] | None"] = ContextVar("attnpred_updated", default=None)


@final
class TieredLayer(DynamicLayer):
    """Keys and values of one full-attention layer in a `BlockPool`; see the module docstring for `update`."""

    def __init__(self, block_size: int, index: int) -> None:
        super().__init__()
        self.index = index
        self.pool = BlockPool(block_size)
        self.returned: tuple[weakref.ref[Tensor], weakref.ref[Tensor]] | None = None
        self.is_awaited = False
        self.reason: str | None = None
        self.is_sparse = False
        self.is_prompt = False

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, cache: "TieredCache", **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        tokens = key_states.shape[-2]
        self.is_prompt = self.pool.length == 0
        self.pool.append(key_states, value_states)
        self.reason = None if self.is_prompt else cache.dense_reason(self.index, tokens, self.pool.length)
        self.is_sparse = not self.is_prompt and self.reason is None
        if self.reason == telemetry.NOT_ATTACHED:
            cache.decoder(self.index).counts.count_dense(self.reason, tokens, self.pool.length, self.pool.bytes())
        keys, values = (key_states, value_states) if self.is_prompt or self.is_sparse else self.pool.view()
        self.returned = weakref.ref(keys), weakref.ref(values)
        self.is_awaited = cache.is_attached
        return keys, values

    def has_returned(self, key: Tensor, value: Tensor) -> bool:
        """True where the last `update` returned these very tensors."""
        return self.returned is not None and self.returned[0]() is key and self.returned[1]() is value

    def get_seq_length(self) -> int:
        return self.pool.length

    def get_max_length(self) -> int:
        return -1

    def get_max_cache_shape(self) -> int:
        """Older name of `get_max_length` (transformers before 5.21)."""
        return -1

    def reset(self) -> None:
        self.pool.clear()
        self.returned = None
        self.is_initialized = False

    def crop(self, tokens_to_remove: int) -> None:
        if tokens_to_remove > 0:
            raise ConfigError(f"got crop({tokens_to_remove}), expected 0 or less: -n removes the last n tokens")
        self.pool.crop(max(0, self.pool.length + tokens_to_remove))

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        if self.pool.length:
            self.pool.select(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.pool.length:
            self.pool.repeat(repeats)

    def offload(self) -> None:
        raise ConfigError(
            "got a request to offload a TieredCache layer, expected none: use DynamicCache(offloading=True) instead"
        )

    prefetch = offload


@final
class TieredCache(Cache):
    """The cache of one `generate` call, or of a conversation: `model.generate(..., past_key_values=cache)`.

    The model must be attached (`attach`); otherwise every step is dense, correct, and counted as a fallback.

    Example:
        with attnpred.attach(model):
            cache = attnpred.TieredCache(model.config, budget=1024)
            model.generate(**inputs, past_key_values=cache)
    """

    def __init__(
        self,
        config: PreTrainedConfig,
        *,
        policy: str | Policy = "predicted",
        settings: CacheConfig | None = None,
        predictor: Predictor | str | Path | None = None,
        **overrides: Any,
    ) -> None:
        self.model_config = config.get_text_config(decoder=True)
        refuse_unsupported(self.model_config)
        self.settings = make_settings(settings, overrides)
        self.policy = make_policy(policy, predictor, self.model_config, self.settings)
        stock = DynamicCache(config=config).layers
        super().__init__(
            layers=[
                TieredLayer(self.settings.block_size, i) if _is_served(layer) else layer
                for i, layer in enumerate(stock)
            ]
        )
        self.decoders: dict[int, LayerDecoder] = {}
        self._warned = False

    def decoder(self, index: int) -> LayerDecoder:
        """Return the decoder of attention layer `index`, made at its first use."""
        if index not in self.decoders:
            self.decoders[index] = LayerDecoder(self.settings, self.policy, telemetry.LayerCounts())
        return self.decoders[index]

    @property
    def is_attached(self) -> bool:
        """True where the model's attention is the function of this module."""
        return bool(self.model_config._attn_implementation == IMPLEMENTATION)

    def dense_reason(self, index: int, tokens: int, length: int) -> str | None:
        """Return why a later call of `tokens` tokens, to a length of `length`, must be dense; None if it need not."""
        if not self.is_attached:
            if self.settings.strict:
                raise NotSparseError(
                    "got a model that is not attached, expected the sparse path: run inside attnpred.attach(model)"
                )
            if not self._warned:
                logger.warning(
                    "the model is not attached: this cache works, but every step is dense (use attnpred.attach)"
                )
                self._warned = True
            return telemetry.NOT_ATTACHED
        if index < self.settings.dense_layers:
            return telemetry.DENSE_LAYER
        if self.policy.is_dense:
            return telemetry.DENSE_POLICY
        if tokens > 1:
            return telemetry.SEVERAL
        return telemetry.FITS if self.decoder(index).fits(length) else None

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        _updated.set(weakref.ref(self))
        if type(self.layers[layer_idx]) is TieredLayer:
            kwargs["cache"] = self
        keys, values = super().update(key_states, value_states, layer_idx, *args, **kwargs)
        return keys, values

    def layer_of(self, index: int, key: Tensor, value: Tensor) -> TieredLayer | None:
        """Return the layer whose `update` returned these very tensors: layer `index`, or one that it shares keys with.

        Raises `UnsupportedModelError` if layer `index` was updated, and something else is attended to.
        """
        for layer in self.layers:
            if type(layer) is TieredLayer and layer.has_returned(key, value):
                layer.is_awaited = False
                return layer
        own = self.layers[index] if 0 <= index < len(self.layers) else None
        if type(own) is TieredLayer and own.is_awaited:
            own.is_awaited = False
            name = self.model_config.model_type
            raise UnsupportedModelError(
                f"got {name}, which changes keys or values after they are cached: run it without attnpred"
            )
        return None

    def __deepcopy__(self, memo: dict[int, Any]) -> "TieredCache":
        """Copy the sequence; policy and model config stay shared (the config tells whether the model is attached)."""
        memo |= {id(shared): shared for shared in (self.model_config, self.settings, self.policy)}
        copied = memo[id(self)] = object.__new__(TieredCache)
        vars(copied).update(copy.deepcopy(vars(self), memo))
        return copied

    def stats(self) -> dict[str, Any]:
        """Return counters per layer and in all (see `attnpred.telemetry`); averages are per decode step."""
        return report([self.decoders[i].counts for i in sorted(self.decoders)], sorted(self.decoders))

    def reset(self) -> None:
        super().reset()
        for decoder in self.decoders.values():
            decoder.clear()

    def crop(self, tokens_to_remove: int) -> None:
        super().crop(tokens_to_remove)
        for decoder in self.decoders.values():
            decoder.crop(self.get_seq_length())

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        super().reorder_cache(beam_idx)
        for decoder in self.decoders.values():
            decoder.select(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)
        for decoder in self.decoders.values():
            decoder.select(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        for decoder in self.decoders.values():
            decoder.repeat(repeats)


def _is_served(layer: object) -> bool:
    return type(layer) is DynamicLayer


def report(counts: list[telemetry.LayerCounts], indices: list[int]) -> dict[str, Any]:
    """Return per-layer counters and their sum as plain numbers."""
    layers = [{"layer": index} | count.as_dict() for index, count in zip(indices, counts, strict=True)]
    return {"layers": layers, "total": telemetry.total(counts).as_dict()}


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
        if isinstance(layer, DynamicLayer) and type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer, DummyLayer):
            raise UnsupportedModelError(
                f"got {name} with cache layers of type {type(layer).__name__}, which cannot be served: run it without attnpred"
            )


def make_settings(settings: CacheConfig | None, overrides: dict[str, Any]) -> CacheConfig:
    """Return `settings`, or the defaults, with single fields replaced."""
    known = {name: getattr(settings or CacheConfig(), name) for name in CacheConfig.__dataclass_fields__}
    unknown = sorted(set(overrides) - set(known))
    if unknown:
        raise ConfigError(f"got setting {unknown[0]!r}, expected one of {', '.join(known)}")
    return CacheConfig(**(known | overrides))


def fingerprint(config: PreTrainedConfig) -> str:
    """Return what a predictor's config names to say which model it was trained for."""
    text = config.get_text_config(decoder=True)
    sizes = (text.num_hidden_layers, text.hidden_size, text.num_attention_heads, text.vocab_size)
    return "-".join([text.model_type, *map(str, sizes)])


def make_policy(
    policy: str | Policy, predictor: Predictor | str | Path | None, config: PreTrainedConfig, settings: CacheConfig
) -> Policy:
    """Return the policy of that name; `predicted` gets the given predictor, or the shipped one that fits best."""
    if isinstance(policy, Policy):
        return policy
    if policy not in POLICIES:
        raise ConfigError(f"got policy {policy!r}, expected one of {', '.join(POLICIES)}")
    if policy != "predicted":
        return POLICIES[policy]()
    if not isinstance(predictor, Predictor):
        predictor = Predictor.from_pretrained(predictor) if predictor is not None else _shipped_predictor(config)
    predictor.require(settings.block_size)
    return Predicted(predictor)


def _shipped_predictor(config: PreTrainedConfig) -> Predictor:
    available = [Predictor.from_pretrained(path) for path in shipped().values()]
    fitting = [p for p in available if p.config.fingerprint == fingerprint(config)]
    if fitting:
        return fitting[0]
    if not available:
        raise ConfigError(
            "got no predictor, and none is shipped: train one (attnpred capture, attnpred train) and pass predictor="
        )
    logger.warning(
        "no predictor was trained for this %s model: using the one of %s; `attnpred train` makes your own",
        config.model_type,
        available[0].config.base_model,
    )
    return available[0]


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The attention function registered with transformers: query [B, Hq, Q, D] to output [B, Q, Hq, D]."""
    terms = AttentionTerms(
        scaling if scaling is not None else query.shape[-1] ** -0.5, kwargs.get("softcap"), kwargs.get("s_aux")
    )
    reference = _updated.get()
    cache = None if reference is None else reference()
    index: int = getattr(module, "layer_idx", -1)
    layer = None if cache is None else cache.layer_of(index, key, value)
    if cache is None or layer is None:
        return _dense(module, query, key, value, attention_mask, dropout, terms, kwargs), None
    decoder = cache.decoder(index)
    is_dense_layer = index < cache.settings.dense_layers
    if layer.is_sparse and not is_dense_layer:
        allowed = None if attention_mask is None else _as_bool(attention_mask)[:, 0, -1]
        return decoder.step(query[:, :, 0], layer.pool, terms, allowed)[:, None], None
    if not layer.is_prompt:
        reason = layer.reason or telemetry.DENSE_LAYER
        decoder.counts.count_dense(reason, query.shape[2], layer.pool.length, layer.pool.bytes())
    if layer.is_sparse:
        # A dense layer that shares the keys of a sparse one: `update` returned too little for it.
        key, value = layer.pool.view()
    output = _dense(module, query, key, value, attention_mask, dropout, terms, kwargs)
    if not is_dense_layer:
        allowed = None if attention_mask is None else _as_bool(attention_mask)[:, 0]
        decoder.observe(query, layer.pool, terms, allowed, prompt=layer.is_prompt)
    return output, None


def _as_bool(mask: Tensor) -> Tensor:
    if mask.dtype == torch.bool:
        return mask
    if bool(((mask != 0) & (mask > -1e3)).any()):
        raise UnsupportedModelError(
            "got an attention mask that is also a bias, expected one that only forbids: run the model without attnpred"
        )
    return mask == 0


def _dense(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    dropout: float,
    terms: AttentionTerms,
    kwargs: dict[str, Any],
) -> Tensor:
    if terms.softcap is None and terms.sinks is None:
        output, _ = sdpa_attention_forward(
            module, query, key, value, mask, dropout=dropout, scaling=terms.scale, **kwargs
        )
        return output
    allowed = None if mask is None else _as_bool(mask)[:, 0]
    return dense_attention(query, key, value, terms, allowed).transpose(1, 2).contiguous()


@final
class Attached:
    """A model with the sparse path switched on; a context manager that switches it off again.

    `model.generate` gets a fresh `TieredCache` per call, unless the caller brings a cache of their own or rules one out.
    """

    def __init__(self, model: PreTrainedModel, make_cache: Callable[[], TieredCache], *, strict: bool) -> None:
        self._model, self._make_cache, self._strict = model, make_cache, strict
        self._caches: list[dict[int, telemetry.LayerCounts]] = []
        self._warned = False
        self._stock_implementation = model.config.get_text_config(decoder=True)._attn_implementation
        self._stock_generate: Callable[..., Any] = model.generate  # type: ignore[assignment]
        self._is_active = False

    def activate(self) -> "Attached":
        """Register attention and mask functions and wrap `generate`."""
        AttentionInterface.register(IMPLEMENTATION, attention)
        AttentionMaskInterface.register(IMPLEMENTATION, sdpa_mask)
        self._model.set_attn_implementation(IMPLEMENTATION)

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
            self._model.set_attn_implementation(self._stock_implementation)

    def _generate(self, *args: Any, **kwargs: Any) -> Any:
        cache = kwargs.get("past_key_values")
        implementation = self._setting("cache_implementation", args, kwargs)
        why = None
        if cache is not None:
            why = None if isinstance(cache, TieredCache) else "past_key_values is another cache"
        elif self._setting("use_cache", args, kwargs) is False:
            why = "use_cache=False"
        elif implementation not in (None, "hybrid"):  # "hybrid" is an old default of the Hub, which `generate` ignores
            why = f"cache_implementation={implementation!r}"
        else:
            cache = kwargs["past_key_values"] = self._make_cache()
            if self._setting("is_assistant", args, kwargs):
                cache.activate_past_recording()  # as `generate` does with a cache that it makes itself
        if why is not None:
            if self._strict:
                raise NotSparseError(f"got {why}, expected the sparse path (strict=True): leave it out")
            if not self._warned:
                logger.warning("%s: the sparse path is off for this call", why)
                self._warned = True
        try:
            return self._stock_generate(*args, **kwargs)
        finally:
            if isinstance(cache, TieredCache):
                self._remember(cache)

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

    def stats(self) -> dict[str, Any]:
        """Return the counters of all `generate` calls so far, per layer and in all."""
        indices = sorted({index for counts in self._caches for index in counts})
        return report([telemetry.total([c[i] for c in self._caches if i in c]) for i in indices], indices)

    def reset_stats(self) -> None:
        """Forget the counters of earlier calls."""
        self._caches = []

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
    policy: str | Policy = "predicted",
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
    if not getattr(model, "_supports_attention_backend", False):
        raise UnsupportedModelError(
            f"got {type(model).__name__}, which does not let its attention be replaced, expected one that does: run it without attnpred"
        )
    if budget is not None:
        overrides["budget"] = budget
    settings = make_settings(config, overrides)
    refuse_unsupported(model.config)
    chosen = make_policy(policy, predictor, model.config, settings)
    if isinstance(chosen, Predicted):
        chosen.predictor.to(model.device)
    if not any(_is_served(layer) for layer in DynamicCache(config=model.config).layers):
        logger.warning("%s has no full-attention layer: there is nothing to compress", model.config.model_type)

    def make_cache() -> TieredCache:
        return TieredCache(model.config, policy=chosen, settings=settings)

    return Attached(model, make_cache, strict=settings.strict).activate()


def load_model(name: str, *, device: str | None = None, dtype: str | torch.dtype = "auto") -> tuple[Any, Any]:
    """Return (model, tokenizer) for a Hub id, a local folder, or `demo`, the embedded language model."""
    source = str(DEMO_MODEL) if name == "demo" else name
    where = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if name == "demo" and where == "cpu":
        dtype = torch.float32
    try:
        tokenizer = AutoTokenizer.from_pretrained(source)
        model: Any = AutoModelForCausalLM.from_pretrained(source, dtype=dtype)
    except (OSError, ValueError) as error:
        first = str(error).strip().splitlines()[0]
        raise UnsupportedModelError(
            f"got model {name!r}, expected a Hub id, a local folder or 'demo': {first}"
        ) from None
    return model.to(where).eval(), tokenizer


def text_streamer(tokenizer: Any) -> Any:
    """Return a streamer for `generate` that prints new text to stdout as it comes."""
    return TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
