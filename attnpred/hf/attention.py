"""The attention function and what it falls back to. It is registered once and recognises its own layers by itself."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from attnpred.errors import ConfigError, UnsupportedModelError
from attnpred.hf.cache import LAST_UPDATED, TieredCache
from attnpred.hf.call import CALL
from attnpred.hf.gradients import without_gradient
from attnpred.hf.layer import TieredLayer
from attnpred.hf.modes import attending_dtype, without_autocast, without_inference_mode
from attnpred.hf.reading import KEPT, Seen
from attnpred.hf.rows import CacheRows
from attnpred.kernels.dense import AttentionTerms
from attnpred.kernels.streamed import StreamedAttention


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
    """The attention function registered with transformers: query [B, Hq, Q, D] to output [B, Q, Hq, D].

    Under autocast it computes in the type of number that stock attention would, and nothing below it is cast again;
    what is remembered under inference mode may be changed outside of it.
    """
    dtype = attending_dtype(query.device, query.dtype)
    with without_autocast(query.device), without_inference_mode():
        query = query.clone() if query.is_inference() else query  # a memory may keep it
        return _attend(module, query, key, value, attention_mask, dropout, scaling, dtype, kwargs), None


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float,
    scaling: float | None,
    dtype: torch.dtype,
    kwargs: dict[str, Any],
) -> Tensor:
    """Return the output [B, Q, Hq, D], numbers of `dtype`."""
    terms = AttentionTerms(
        scaling if scaling is not None else query.shape[-1] ** -0.5, kwargs.get("softcap"), kwargs.get("s_aux")
    )
    reference = LAST_UPDATED.get()
    cache: Any = None if reference is None else reference()
    if type(cache) is CacheRows:
        return _attend_rows(module, query, cache, attention_mask, dropout, scaling, dtype, kwargs)
    index: int = getattr(module, "layer_idx", -1)
    layer = None if cache is None else cache.layer_of(index, key, value)
    if cache is None or layer is None:
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
        return _dense(module, query, key, value, attention_mask, dropout, terms, kwargs)
    query = query.to(layer.dtype)
    shares = cache.sharing is not None and cache.sharing.concerns(index) and cache.decoder(index).left.kept is None
    if not layer.is_prompt or shares:
        with torch.no_grad():
            output = _attend_stored(module, query.detach(), attention_mask, cache, layer, index, shares, terms, kwargs)
        return without_gradient(output.to(dtype), query, key, value)
    output = _dense(module, query, key, value, attention_mask, dropout, terms, kwargs)
    with torch.no_grad():
        query, key, value = query.detach(), key.detach(), value.detach()  # what is kept of them keeps no graph
        told = output.detach()[:, -cache.settings.history :].transpose(1, 2).contiguous()
        _note_tokens(cache, layer, index, query)
        allowed = None if attention_mask is None else _as_bool(attention_mask)[:, 0]
        reading = KEPT.get()
        if reading is not None:
            reading.layers.append(Seen(index, query, key, value, terms, allowed, told))
        if not cache.settings.is_dense_layer(index):
            cache.decoder(index).observe(query, layer.store, terms, allowed, prompt=True, keys=key, output=told)
    return output.to(dtype)


def _attend_rows(
    module: nn.Module,
    query: Tensor,
    rows: CacheRows,
    mask: Tensor | None,
    dropout: float,
    scaling: float | None,
    dtype: torch.dtype,
    kwargs: dict[str, Any],
) -> Tensor:
    """Return the output of a step of several caches: of each what it would be alone."""
    if mask is not None:
        raise UnsupportedModelError("got rows of several caches with a mask, expected none: let them take turns")
    each = enumerate(rows.rows())
    return torch.cat(
        [_attend(module, query[i : i + 1], *own, None, dropout, scaling, dtype, kwargs) for i, own in each]
    )


def _attend_stored(
    module: nn.Module,
    query: Tensor,
    attention_mask: Tensor | None,
    cache: TieredCache,
    layer: TieredLayer,
    index: int,
    shares: bool,
    terms: AttentionTerms,
    kwargs: dict[str, Any],
) -> Tensor:
    """Return the output of a call that attends to what the store holds, or what stores hold together."""
    decoder, store = cache.decoder(index), layer.store
    remember = not cache.settings.is_dense_layer(index)
    _note_tokens(cache, layer, index, query)
    if cache.sharing is not None and shares and not layer.is_sparse:
        allowed = _everything(module, query, store.length, attention_mask, kwargs.get("is_causal"))
        is_step = not layer.is_prompt and query.shape[2] == 1
        if layer.reason is not None and not is_step:
            decoder.counts.count_dense(layer.reason, query.shape[2], store.length, store.bytes())
        output = cache.sharing.attend(index, query, terms, allowed, decoder.counts, count=is_step)
        if remember:
            decoder.observe(query, store, terms, allowed, prompt=layer.is_prompt, output=output)
        return output.transpose(1, 2).contiguous()
    if layer.is_sparse:  # then so are the layers that share its keys, for they come later
        allowed = None if attention_mask is None else _as_bool(attention_mask)[:, 0, -1]
        output = decoder.step(query[:, :, 0], store, terms, allowed)[:, None]
        if cache.sharing is not None:
            cache.sharing.settle(index)
        return output
    assert layer.reason is not None
    decoder.counts.count_dense(layer.reason, query.shape[2], store.length, store.bytes())
    allowed = _everything(module, query, store.length, attention_mask, kwargs.get("is_causal"))
    output = decoder.attend(query, store, terms, allowed, remember=remember)
    if cache.sharing is not None:
        cache.sharing.settle(index)
    return output.transpose(1, 2).contiguous()


def _note_tokens(cache: TieredCache, layer: TieredLayer, index: int, query: Tensor) -> None:
    """Give the token ids of this call to a memory that reads them. Raises `ConfigError` where it has none."""
    decoder = cache.decoder(index)
    if not decoder.policy.reads_tokens or cache.settings.is_dense_layer(index):
        return
    call = CALL.get()
    ids = None if call is None else call.tokens
    if ids is None or ids.shape[0] != query.shape[0] or ids.shape[1] < query.shape[2]:
        raise ConfigError(
            "got a call without token ids, expected input_ids: this policy reads them, so inputs_embeds will not do"
        )
    decoder.memory.read(ids, layer.store.length)


def make_mask(**kwargs: Any) -> Tensor | None:
    """The mask function registered with transformers: stock, but it notes how many queries the call has."""
    call = CALL.get()
    if call is not None:
        call.queries = kwargs["q_length"]
    return sdpa_mask(**kwargs)


def _implied(module: nn.Module, query: Tensor, key: Tensor, is_plain: bool, is_causal: bool | None) -> Tensor | None:
    """Return the causal mask that None stands for, where the kernel would take it for another one.

    It stands for a call without a past. Gemma4 gives its last layers the last queries of it alone, and a static cache
    has room behind the last key; torch's causal flag knows only the second of these, `StreamedAttention` only the first.
    """
    if not (getattr(module, "is_causal", True) if is_causal is None else is_causal):
        return None
    queries, length = query.shape[2], key.shape[2]
    call = CALL.get()
    left_out = 0 if call is None else max(0, call.queries - queries)
    if not left_out and (is_plain or queries in (1, length)):
        return None
    return torch.ones(1, 1, queries, length, dtype=torch.bool, device=query.device).tril(left_out)


def _everything(
    module: nn.Module, query: Tensor, length: int, mask: Tensor | None, is_causal: bool | None
) -> Tensor | None:
    """Return what the queries of a call with a past may attend to, [B, Q, L], or None: the last Q of L, causal."""
    if mask is not None:
        return _as_bool(mask)[:, 0]
    if getattr(module, "is_causal", True) if is_causal is None else is_causal:
        return None
    return torch.ones(1, query.shape[2], length, dtype=torch.bool, device=query.device)


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
    is_plain = terms.softcap is None and terms.sinks is None
    mask = _implied(module, query, key, is_plain, kwargs.get("is_causal")) if mask is None else mask
    if is_plain:
        output, _ = sdpa_attention_forward(
            module, query, key, value, mask, dropout=dropout, scaling=terms.scale, **kwargs
        )
        return output
    attention = StreamedAttention(query, key.shape[2], terms, None if mask is None else _as_bool(mask)[:, 0])
    attention.add(0, key, value)
    return attention.result().transpose(1, 2).contiguous()
