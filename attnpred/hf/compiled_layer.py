"""Decoder layers of the Llama shape as two compiled calls a step, attention between them (`attnpred.kernels.numba_layer`).

A layer of a class in `LAYERS` whose weights are packed gets a `forward` of its own. It takes a decode step of a few rows
with a `TieredCache` of an attached model; every other call, a prompt above all, is the stock `forward`. The layer's output
is what stock users see. Its parts are not called then: so where somebody hooks one, or gives it another `forward` or weight,
the layer is stock again, as long as that lasts, and the steps are counted.
"""

from types import MethodType
from typing import Any, final

import torch
from torch import Tensor

from attnpred.errors import ConfigError
from attnpred.hf.argument import NAMES
from attnpred.hf.attention import attention
from attnpred.hf.cache import IMPLEMENTATION, TieredCache
from attnpred.hf.packed_forward import PackedForward
from attnpred.hf.unchanged import Unchanged
from attnpred.kernels.numba_layer import Layer, Norm, Norms
from attnpred.kernels.numba_linear import MOST

LAYERS = {
    "LlamaDecoderLayer": ("LlamaAttention", "LlamaMLP", "LlamaRMSNorm"),
    "MistralDecoderLayer": ("MistralAttention", "MistralMLP", "MistralRMSNorm"),
    "Qwen2DecoderLayer": ("Qwen2Attention", "Qwen2MLP", "Qwen2RMSNorm"),
    "Qwen3DecoderLayer": ("Qwen3Attention", "Qwen3MLP", "Qwen3RMSNorm"),
    "Gemma3DecoderLayer": ("Gemma3Attention", "Gemma3MLP", "Gemma3RMSNorm"),
}
"""Classes of transformers whose layers are a norm, attention with rotary embedding, a norm, and an MLP with a gate."""
NORMS = {"before": "input_layernorm", "after": "post_attention_layernorm"}
NORMS_OF_HEADS = {"of_query": "self_attn.q_norm", "of_key": "self_attn.k_norm"}
NORMS_OF = {
    "Qwen3DecoderLayer": NORMS | NORMS_OF_HEADS,
    "Gemma3DecoderLayer": NORMS_OF_HEADS
    | {"before": "input_layernorm", "behind_attention": "post_attention_layernorm"}
    | {"after": "pre_feedforward_layernorm", "behind_mlp": "post_feedforward_layernorm"},
}
"""Where the norms of a layer (`numba_layer.Norms`) are, if not where `NORMS` says."""
SHORT_OF_ONE = ("Gemma3RMSNorm",)
"""Norms whose weight is to be added to one."""
ACTIVATIONS = {"SiLU": "silu", "SiLUActivation": "silu", "GELUTanh": "gelu_tanh", "PytorchGELUTanh": "gelu_tanh"}


@final
class CompiledForward:
    """Stands for the `forward` of a decoder layer; steps: those that it took; hooked: those that a hook gave back."""

    kind = None
    """Nothing is packed here (`attnpred.hf.weights.packed_kind`)."""

    def __init__(self, layer: Any, layer_of: Layer) -> None:
        self._stock, self._module, self.layer = type(layer).forward, layer, layer_of
        self.attention = layer.self_attn
        self._sliding = {"sliding_window": getattr(layer.self_attn, "sliding_window", None)}
        self._unchanged = Unchanged(layer)
        self.steps = self.hooked = 0
        self.is_sliding = self._sliding["sliding_window"] is not None

    def __call__(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Return the layer's output [B, Q, width]."""
        if not args and self._is_step(hidden_states, kwargs):
            if self.is_free():
                self.steps += 1
                return self._step(hidden_states, **kwargs)
            self.hooked += 1
        return self._stock(self._module, hidden_states, *args, **kwargs)

    def _is_step(self, x: Tensor, kwargs: dict[str, Any]) -> bool:
        shape, cache = x.shape, next((kwargs[name] for name in NAMES if kwargs.get(name) is not None), None)
        tables = kwargs.get("position_embeddings")
        return (
            len(shape) == 3
            and shape[1] == 1
            and shape[0] <= MOST
            and tables is not None
            and x.dtype == tables[0].dtype == self.layer.dtype
            and tables[0].shape[-1] == self.layer.dim
            and type(cache) is TieredCache
            and self.attention.config._attn_implementation == IMPLEMENTATION
            and not self._module.training
            and not (x.requires_grad and torch.is_grad_enabled())
            and not torch.is_autocast_enabled("cpu")
        )

    def is_free(self) -> bool:
        """Return whether nobody listens to a part of the layer, or has changed what it is or does."""
        return self._unchanged.holds()

    def _step(
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, *, position_embeddings: Any, **kwargs: Any
    ) -> Tensor:
        cache: Any = next(found for found in (kwargs.pop(name, None) for name in NAMES) if found is not None)
        hidden, own = hidden_states.detach().contiguous(), self.attention
        query, key, value = self.layer.head(hidden, *(table.contiguous() for table in position_embeddings))
        key, value = cache.update(key, value, own.layer_idx)
        found, _ = attention(
            own, query, key, value, attention_mask, dropout=0.0, scaling=own.scaling, **self._sliding, **kwargs
        )
        return self.layer.tail(hidden, found.reshape(*hidden.shape[:2], -1).contiguous())

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        """Return the stock `forward` of the layer's copy."""
        return MethodType(self._stock, memo[id(self._module)])

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise ConfigError("got packed weights to pickle, expected plain ones: detach the model first")


def compiled_forward(layer: Any) -> CompiledForward | None:
    """Return what stands for the `forward` of a layer; None where it cannot be compiled."""
    kind = type(layer).__name__
    names = LAYERS.get(kind)
    if names is None or "forward" in vars(layer) or not type(layer).__module__.startswith("transformers.models."):
        return None
    own, mlp = layer.self_attn, layer.mlp
    parts = (type(own).__name__, type(mlp).__name__, type(layer.input_layernorm).__name__)
    activation = ACTIVATIONS.get(type(mlp.act_fn).__name__)
    if parts != names or activation is None or getattr(own, "attn_logit_softcapping", None):
        return None
    groups = [(own.q_proj, own.k_proj, own.v_proj), (own.o_proj,), (mlp.gate_proj, mlp.up_proj), (mlp.down_proj,)]
    packed = [[vars(one).get("forward") for one in group] for group in groups]
    if not all(isinstance(one, PackedForward) for group in packed for one in group):
        return None
    inputs, output, gate_up, down = (group[0].together.all for group in packed)
    if [len(group) for group in groups] != [len(one.rows) for one in (inputs, output, gate_up, down)]:
        return None  # not all in one call
    norms = Norms(**{name: _norm(layer.get_submodule(path)) for name, path in NORMS_OF.get(kind, NORMS).items()})
    if norms.before.dtype != inputs.dtype:
        return None
    return CompiledForward(layer, Layer(norms, inputs, output, gate_up, down, own.head_dim, activation))


def _norm(norm: Any) -> Norm:
    is_short = type(norm).__name__ in SHORT_OF_ONE
    return Norm(norm.weight, norm.eps if is_short else norm.variance_epsilon, 1.0 if is_short else 0.0)
