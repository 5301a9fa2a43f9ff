"""A token as one compiled call: the `forward` of a decoder whose layers are all compiled (`attnpred.kernels.numba_token`).

Embedding, rotary tables and last norm are called as they are; between them is one call for all layers, where each has a plan
(`attnpred.plan`) and nobody listens to one. Every other call is the stock `forward`, in which layers are compiled one by one
as before (`attnpred.hf.compiled_layer`); where it is a decode step, it is counted with its reason.
"""

import weakref
from collections import Counter
from collections.abc import Sequence
from types import MethodType
from typing import Any, final

import torch
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutputWithPast

from attnpred import telemetry
from attnpred.errors import ConfigError
from attnpred.hf.argument import NAMES, cache_argument
from attnpred.hf.cache import IMPLEMENTATION, TieredCache
from attnpred.hf.compiled_layer import CompiledForward
from attnpred.hf.layer import TieredLayer
from attnpred.hf.modes import without_inference_mode
from attnpred.hf.unchanged import Unchanged
from attnpred.plan import Plan, plan_for
from attnpred.policies.select import Zone

DECODERS = ("LlamaModel", "MistralModel", "Qwen2Model", "Qwen3Model")
"""Classes of transformers that are an embedding, layers that all see the same rotary tables and mask, and a norm."""
KNOWN = (*NAMES, "input_ids", "attention_mask", "position_ids", "inputs_embeds", "use_cache", "cache_position")
"""Arguments that a token in one call can have; others have to be None or False."""
HOOK, MASK, NO_PLAN = "a hook, or something changed, in a layer", "a mask", "a step that is not planned"


@final
class CompiledStack:
    """Stands for the `forward` of a decoder; tokens: those that were one call; apart: steps that were not, and why."""

    kind = None
    """Nothing is packed here (`attnpred.hf.weights.packed_kind`)."""

    def __init__(self, module: Any, layers: Sequence[CompiledForward]) -> None:
        self._stock, self._module, self._layers = type(module).forward, module, layers
        self.tokens, self.apart = 0, Counter[str]()
        self._unchanged = Unchanged(module.layers)
        self._next: Any = None  # the cache of the last token, and how many it holds then
        self._last: Any = None  # addresses of plans, and the token made of them

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Return what the decoder does: last hidden state [B, Q, width], and cache."""
        cache = next((kwargs[name] for name in NAMES if kwargs.get(name) is not None), None)
        if not args and type(cache) is TieredCache and self._is_step(kwargs):
            found = self._token(cache, kwargs)
            if isinstance(found, Tensor):
                self.tokens += 1
                return BaseModelOutputWithPast(last_hidden_state=found, **cache_argument(cache))
            self.apart[found] += 1
        self._next = None
        return self._stock(self._module, *args, **kwargs)

    def _is_step(self, kwargs: dict[str, Any]) -> bool:
        """Return whether it is a call of one token for each row, of which nothing but the last hidden state is wanted."""
        ids, own = kwargs.get("input_ids"), self._module
        return (
            ids is not None
            and ids.ndim == 2
            and ids.shape[1] == 1
            and kwargs.get("inputs_embeds") is None
            and kwargs.get("use_cache") is not False
            and all(name in KNOWN or value is None or value is False for name, value in kwargs.items())
            and own.config._attn_implementation == IMPLEMENTATION
            and not (own.config.output_hidden_states or own.config.output_attentions or own.training)
            and not (torch.is_grad_enabled() and own.embed_tokens.weight.requires_grad)
            and not torch.is_autocast_enabled("cpu")
        )

    def _token(self, cache: TieredCache, kwargs: dict[str, Any]) -> Tensor | str:
        """Return the last hidden state [B, 1, width], or why there is none."""
        cache.begin_call()
        mask, ids, length = kwargs.get("attention_mask"), kwargs["input_ids"], cache.get_seq_length()
        if mask is not None and not (mask.ndim == 2 and bool(mask.all())):
            return MASK
        if not self._is_free(cache, length):
            return HOOK
        with without_inference_mode():
            plans = self._plans(cache, ids.shape[0])
            if plans is None:
                return telemetry.FITS if any(own.fits(length + 1) for own in cache.decoders.values()) else NO_PLAN
            zones: dict[Any, Zone] = {}
            for plan in plans:
                zone = zones.get(plan.key) or zones.setdefault(plan.key, plan.zone(length + 1))
                if zone.covers_all and plan.may_be_dense:
                    return telemetry.FITS
                plan.begin(zone)
        places = kwargs.get("position_ids")
        if places is None:
            places = torch.full((1, 1), length, dtype=torch.int64, device=ids.device)
        hidden = self._module.embed_tokens(ids)
        cos, sin = self._module.rotary_emb(hidden, position_ids=places)
        found = hidden.detach()[:, 0].to(torch.float32, copy=True, memory_format=torch.contiguous_format)
        self._run(plans, found, cos, sin, length)
        for plan in plans:
            plan.done()
        return self._module.norm(found.to(hidden.dtype)[:, None])

    def _plans(self, cache: TieredCache, batch: int) -> list[Plan] | None:
        """Return the plans of all layers for a token more in each of `batch` rows."""
        plans = []
        for own, layer in zip(self._layers, cache.layers, strict=False):
            decoder = cache.decoders.get(own.attention.layer_idx)
            if type(layer) is not TieredLayer or decoder is None:
                return None
            plan = plan_for(decoder, layer.store, own.layer.heads, own.attention.scaling)
            if plan is None or plan.shape != (batch, own.layer.kv_heads, own.layer.dim):
                return None
            plans.append(plan)
        return plans

    def _run(self, plans: list[Plan], hidden: Tensor, cos: Tensor, sin: Tensor, length: int) -> None:
        """Bring hidden [B, width] through all layers, in place; cos and sin [B or 1, 1, D]."""
        from attnpred.kernels.numba_token import Token  # numba is loaded when it is used, not before

        addresses = [plan.address for plan in plans]
        if self._last is None or self._last[0] != addresses:
            self._last = addresses, Token([own.layer.fields.ctypes.data for own in self._layers], addresses)
        self._last[1].run(
            hidden, cos.flatten(0, 1).float().contiguous(), sin.flatten(0, 1).float().contiguous(), length
        )

    def _is_free(self, cache: TieredCache, length: int) -> bool:
        """Return whether nobody listens to a layer or a part of it, or has changed what it is or does.

        That takes a twentieth of a token, so where it goes on from its own last one only hooks are looked for.
        """
        last, self._next = self._next, (weakref.ref(cache), length + 1)
        if last is not None and last[0]() is cache and last[1] == length:
            return not self._unchanged.is_heard()
        return self._unchanged.holds() and bool(self._module.config.num_hidden_layers == len(self._layers))

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        """Return the stock `forward` of the decoder's copy."""
        return MethodType(self._stock, memo[id(self._module)])

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise ConfigError("got packed weights to pickle, expected plain ones: detach the model first")


def compiled_stack(decoder: Any) -> CompiledStack | None:
    """Return what stands for the `forward` of a decoder; None where not all of it is compiled."""
    kind = type(decoder)
    if (
        kind.__name__ not in DECODERS
        or not kind.__module__.startswith("transformers.models.")
        or "forward" in vars(decoder)
    ):
        return None
    layers = [vars(layer).get("forward") for layer in decoder.layers]
    if not layers or not all(isinstance(layer, CompiledForward) and not layer.is_sliding for layer in layers):
        return None
    return CompiledStack(decoder, layers)
