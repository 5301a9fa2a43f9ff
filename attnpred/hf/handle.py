"""`Attached`: a model with the sparse path switched on, what its calls go through, and how it is given back."""

import copy
import functools
import logging
from collections.abc import Callable
from contextvars import ContextVar
from types import TracebackType
from typing import Any, final

from torch import Tensor
from torch.utils.hooks import RemovableHandle
from transformers import AttentionInterface, PreTrainedModel
from transformers.masking_utils import AttentionMaskInterface

from attnpred.errors import ConfigError, NotSparseError
from attnpred.hf.argument import NAME, cache_argument, take_cache
from attnpred.hf.attention import attention, make_mask
from attnpred.hf.cache import IMPLEMENTATION, TieredCache
from attnpred.hf.call import Call, watch
from attnpred.hf.modes import attending_dtype
from attnpred.hf.packing import Packing, copied_plain
from attnpred.hf.tally import Tally

logger = logging.getLogger("attnpred")

GENERATING: ContextVar[tuple[PreTrainedModel | None, TieredCache | None]] = ContextVar(
    "attnpred_generating", default=(None, None)
)
"""The model whose `generate` runs in this thread, and the cache of ours that it was given."""


@final
class Attached:
    """A model with the sparse path switched on; a context manager that switches it off again.

    `model.generate` gets a fresh `TieredCache` per call, unless the caller brings a cache of their own or rules one out.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        make_cache: Callable[[], TieredCache],
        what: str,
        *,
        strict: bool,
        packing: Packing | None = None,
    ) -> None:
        self._model, self._make_cache, self._what, self._strict = model, make_cache, what, strict
        self._packing = packing
        self._tally = Tally()
        self._said: set[str] = set()
        self._stock_implementation = model.config.get_text_config(decoder=True)._attn_implementation
        self._stock_generate: Callable[..., Any] = model.generate  # type: ignore[assignment]
        self._stock_prepare: Callable[..., Any] = model.prepare_inputs_for_generation  # type: ignore[assignment]
        self._hooks: list[RemovableHandle] = []
        self._ours: dict[str, Any] = {}

    def activate(self) -> "Attached":
        """Register attention and mask functions, hook the model's calls, and wrap `generate`."""
        AttentionInterface.register(IMPLEMENTATION, attention)
        AttentionMaskInterface.register(IMPLEMENTATION, make_mask)
        self._model.set_attn_implementation(IMPLEMENTATION)
        self._hooks = watch(self._model, self._enter, self._leave)
        self._ours = {
            "generate": _as(self._stock_generate, self._generate),
            "prepare_inputs_for_generation": _as(self._stock_prepare, self._prepare),
            "__deepcopy__": self._plain_copy,
            "__reduce_ex__": self._refuse_to_pickle,
        }
        vars(self._model).update(self._ours)
        return self

    def new_cache(self) -> TieredCache:
        """Return an empty cache with this handle's settings, for calls of the model outside `generate`."""
        return self._make_cache()

    def detach(self) -> None:
        """Give the model back as it was; a second call does nothing."""
        if self._packing is not None:
            self._packing.undo()
        if self._ours:
            for name in self._ours:
                vars(self._model).pop(name, None)
            self._ours = {}
            for hook in self._hooks:
                hook.remove()
            self._model.set_attn_implementation(self._stock_implementation)

    def _generate(self, *args: Any, **kwargs: Any) -> Any:
        if not self._ours:  # somebody has kept the function
            return self._stock_generate(*args, **kwargs)
        cache = take_cache(kwargs)
        implementation = self._setting("cache_implementation", args, kwargs)
        if cache is not None:
            if not isinstance(cache, TieredCache):
                self._fall_back(f"{NAME} is another cache")
        elif self._setting("use_cache", args, kwargs) is False:
            self._fall_back("use_cache=False")
        elif implementation not in (None, "hybrid"):  # "hybrid" is an old default of the Hub, which `generate` ignores
            self._fall_back(f"cache_implementation={implementation!r}")
        else:
            cache = self._make_cache()
            if self._setting("is_assistant", args, kwargs):
                cache.activate_past_recording()  # as `generate` does with a cache that it makes itself
        if cache is not None:
            kwargs |= cache_argument(cache)
        if not isinstance(cache, TieredCache):
            return self._stock_generate(*args, **kwargs)
        self._admit(cache, args, kwargs)
        running = GENERATING.set((self._model, cache))
        try:
            result = self._stock_generate(*args, **kwargs)
        finally:
            GENERATING.reset(running)
            self._tally.add(cache)
        cache.tokens = self._tokens_in(cache, result, args, kwargs)
        return result

    def _prepare(self, *args: Any, **kwargs: Any) -> Any:
        """Keep our cache where a model drops it to read all tokens anew, as Phi-3 does when its rotations change."""
        inputs = self._stock_prepare(*args, **kwargs)
        cache, (model, ours) = kwargs.get(NAME), GENERATING.get()
        if model is self._model and cache is ours and ours is not None and inputs.get(NAME) is None:
            tokens = inputs.get("input_ids")
            if tokens is not None and tokens.shape[1] > ours.get_seq_length():
                ours.reset()
                inputs |= cache_argument(ours)
        return inputs

    def _enter(self, call: Call, kwargs: dict[str, Any]) -> None:
        wanted = kwargs.get("output_attentions")
        if self._model.config.output_attentions if wanted is None else wanted:
            raise ConfigError(
                "got output_attentions=True, expected False: an attached model keeps no attention weights; detach it first"
            )
        model, ours = GENERATING.get()
        if model is self._model and call.cache is not ours:
            self._fall_back("a step of generate used another cache")

    def _leave(self, call: Call) -> None:
        if isinstance(call.cache, TieredCache) and call.cache.get_seq_length() == call.held:
            self._fall_back("the model did not use its cache (gradient checkpointing in training mode does that)")

    def _fall_back(self, why: str) -> None:
        """Count a call that cannot be sparse, and say so once. Raises `NotSparseError` under `strict`."""
        if self._strict:
            raise NotSparseError(f"got {why}, expected the sparse path (strict=True): leave it out")
        self._tally.add_not_sparse(why)
        if why not in self._said:
            logger.warning("%s: the sparse path is off for this call", why)
            self._said.add(why)

    def _plain_copy(self, memo: dict[int, Any]) -> PreTrainedModel:
        """Return what `copy.deepcopy` of the model is: a model of its own, which is not attached."""
        kept = {name: vars(self._model).pop(name) for name in self._ours}
        try:
            copied = copy.deepcopy(self._model, memo)
        finally:
            vars(self._model).update(kept)
        for hook in copy.deepcopy(self._hooks, memo):  # those of the copy, for it is in the memo
            hook.remove()
        copied.set_attn_implementation(self._stock_implementation)
        copied_plain(self._packing, memo)
        return copied

    def _refuse_to_pickle(self, protocol: int) -> Any:
        raise ConfigError(
            "got an attached model to pickle, expected a free one: call detach() first, or save it by save_pretrained"
        )

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
        held = attending_dtype(self._model.device, self._model.dtype)
        cache.admit(tokens, prompt.shape[0] * max(copies), held)

    def _setting(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Return what `generate(*args, **kwargs)` goes by: its argument, else its generation config's, else the model's."""
        given = kwargs.get("generation_config", args[1] if len(args) > 1 else None)
        found = [kwargs.get(name), getattr(given, name, None), getattr(self._model.generation_config, name, None)]
        return next((value for value in found if value is not None), None)

    def stats(self) -> dict[str, Any]:
        """Return the counters of all `generate` calls so far, per layer and in all; bytes held are those of the largest.

        `not_sparse` counts the calls that could not use a cache of ours, by reason; `weights` says what is packed, if
        any are.
        """
        packed = {} if self._packing is None else {"weights": self._packing.stats()}
        return self._tally.report() | packed

    def reset_stats(self) -> None:
        """Forget the counters of earlier calls."""
        self._tally = Tally()

    def __repr__(self) -> str:
        detached = "" if self._ours else ", detached"
        return f"Attached({type(self._model).__name__}, {self._what}{detached})"

    def __enter__(self) -> "Attached":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.detach()


def _as(stock: Callable[..., Any], ours: Callable[..., Any]) -> Callable[..., Any]:
    """Return `ours` with the name, the text and the signature of `stock`, at which `generate` looks."""
    return functools.update_wrapper(functools.partial(ours), stock)
