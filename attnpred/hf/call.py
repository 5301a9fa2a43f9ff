"""One call of a model: what is known of it while it runs. Nothing of it is left when it ends, however it ends.

The hooks stand on the model and on the parts of it that can be called in its place; the outermost call counts.
"""

import weakref
from collections.abc import Callable, Iterable
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from attnpred.hf.argument import NAMES, cache_argument, take_cache


@dataclass(slots=True)
class Call:
    """A call of `module`, of `model` or a part of it, with `cache`, which held `held` tokens before.

    tokens: ids [B, Q] that the embedding was called with, if it was; queries: how many it has, as its input or its masks
    tell (masks of a static cache are made before the call).
    """

    model: "weakref.ref[PreTrainedModel]"
    module: nn.Module
    cache: Cache | None
    held: int
    tokens: Tensor | None = None
    queries: int = 0


CALL: ContextVar[Call | None] = ContextVar("attnpred_call", default=None)
"""The call that runs in this thread."""


def watch(
    model: PreTrainedModel, enter: Callable[[Call, dict[str, Any]], None], leave: Callable[[Call], None]
) -> list[RemovableHandle]:
    """Hook all calls of `model`; `enter` sees each and its arguments before it runs, `leave` once it came through."""

    reference = weakref.ref(model)

    # Functions, not methods: a copy of the model has them too, for a moment, and must not copy whose they are.
    def before(
        module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        running = CALL.get()
        if running is None or running.module is module:
            cache = _rename(kwargs)
            embedded = kwargs.get("inputs_embeds")
            held = cache.get_seq_length() if isinstance(cache, Cache) else 0
            call = Call(reference, module, cache, held, queries=0 if embedded is None else embedded.shape[1])
            enter(call, kwargs)
            CALL.set(call)
        return args, kwargs

    def after(module: nn.Module, args: Any, result: Any) -> None:
        call = CALL.get()
        if call is not None and call.module is module:
            CALL.set(None)
            if result is not None:  # what comes of a call that failed
                leave(call)

    def note(module: nn.Module, args: tuple[Any, ...]) -> None:
        call = CALL.get()
        if call is not None:
            call.tokens = args[0] if args else None
            if call.tokens is not None:
                call.queries = max(call.queries, call.tokens.shape[-1])

    handles = [model.get_input_embeddings().register_forward_pre_hook(note)]
    for part in _callable_parts(model):
        handles.append(part.register_forward_pre_hook(before, with_kwargs=True))
        handles.append(part.register_forward_hook(after, always_call=True))
    return handles


def _callable_parts(model: PreTrainedModel) -> Iterable[nn.Module]:
    """Return the model, the model without its head, and the decoder in it, each once."""
    return {id(part): part for part in (model, model.base_model, model.get_decoder())}.values()


def _rename(kwargs: dict[str, Any]) -> Any:
    """Return the cache among the arguments, which now has the name that this version wants."""
    if not any(name in kwargs for name in NAMES):
        return None
    cache = take_cache(kwargs)
    kwargs |= cache_argument(cache)
    return cache
