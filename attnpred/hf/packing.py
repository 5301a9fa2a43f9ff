"""Weights of a model in few bits while this lasts: products behind `nn.Linear`, and the model given back as it was.

Each plain `nn.Linear`, the language-model head too, gets a `forward` of its own, an attribute of the instance, which is
taken away again. Its weight stays where it is, untouched, or lies in a file (`attnpred.hf.originals`): it comes back bit for
bit. Without the file, memory grows by the packed copy.
What the copy stands for is the model meanwhile, for prompts as well: there the matrix is unpacked piece by piece, and torch
multiplies. Projections that read the same input (`FUSED`) are one call (`attnpred.hf.packed_forward`), and layers of known
families are two (`attnpred.hf.compiled_layer`), all of them together one (`attnpred.hf.compiled_stack`).

The language-model head never has less than 8 bits: in 4 it costs SmolLM2 0.07 nats a token, all other layers together
next to nothing (docs/LOG.md).

With "float" nothing is packed, the weights are read where they are, and the same kernels and compiled layers are used.

What is no plain `nn.Linear` is left as it is, and counted: `Conv1D`, experts, adapters, layers that somebody has hooked.
"""

from collections import Counter
from collections.abc import Iterator
from types import TracebackType
from typing import Any, final

import torch
from torch import nn
from transformers import PreTrainedModel

from attnpred.errors import ConfigError, UnsupportedModelError, missing_extra
from attnpred.hf.originals import Originals, check_place
from attnpred.hf.weights import adapters, packed_kind
from attnpred.kernels import DIGEST
from attnpred.kernels.linear import BITS, pack

FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Names of projections of one module that get the same input."""
AS_THEY_ARE = "float"
"""What is asked for to have the products and compiled layers of ours, and the numbers of the model."""


@final
class Packing:
    """The packed weights of a model: a context manager that gives it back as it was."""

    def __init__(self, model: PreTrainedModel, kind: str, originals: str | None = None) -> None:
        self.kind, self.bytes, self.left = kind, 0, Counter[str]()
        self._layers: list[nn.Linear] = []
        self._compiled: list[tuple[nn.Module, Any]] = []
        self._stack: list[tuple[nn.Module, Any]] = []
        self._head, self._originals = model.get_output_embeddings(), Originals()
        adapted = {id(part) for part in adapters(model)}
        try:
            for module in model.modules():
                self._count_left(module, adapted)
                for layers in _groups(module):
                    plain = [layer for layer in layers if self._can_have(layer) and id(layer) not in adapted]
                    if plain:
                        self._pack(plain)
            if originals is not None:
                self._originals.put_away(model, self._layers)
            self._compile(model)
        except BaseException:
            self.undo()
            raise

    def _pack(self, layers: list[nn.Linear]) -> None:
        from attnpred.hf.packed_forward import PackedForward, Together  # loads numba

        if self.kind == AS_THEY_ARE:
            weights: list[Any] = [layer.weight.detach() for layer in layers]
        else:
            bits = 8 if layers[0] is self._head else BITS[self.kind]
            weights = [pack(layer.weight, bits) for layer in layers]
            self.bytes += sum(weight.bytes() for weight in weights)
        together = Together(layers, weights)
        for number, layer in enumerate(layers):
            vars(layer)["forward"] = PackedForward(together, number, self.kind, layer)
            self._layers.append(layer)

    def _can_have(self, layer: nn.Linear) -> bool:
        """Return whether the layer is plain, and of a size that the kernels take."""
        fits = self.kind != AS_THEY_ARE or (layer.out_features >= 4 and layer.in_features % 16 == 0)
        return _is_plain(layer) and fits

    def _compile(self, model: PreTrainedModel) -> None:
        from attnpred.hf.compiled_layer import compiled_forward
        from attnpred.hf.compiled_stack import compiled_stack

        for module in model.modules():
            found = compiled_forward(module)
            if found is not None:
                vars(module)["forward"] = found
                self._compiled.append((module, found))
        decoder = model.get_decoder()
        stack = compiled_stack(decoder)
        if stack is not None:
            vars(decoder)["forward"] = stack
            self._stack.append((decoder, stack))

    def _count_left(self, module: nn.Module, adapted: set[int]) -> None:
        if isinstance(module, nn.Linear):
            if id(module) in adapted:
                self.left["adapter"] += 1
            elif not is_packed(module) and not self._can_have(module):
                self.left["narrow Linear" if _is_plain(module) else "hooked Linear"] += 1
        elif not isinstance(module, nn.Embedding) and any(x.ndim > 1 for x in module.parameters(recurse=False)):
            self.left[type(module).__name__] += 1

    def stats(self) -> dict[str, Any]:
        """Return how many layers are packed in how many bytes, and how many with a matrix were left, by their class.

        originals: bytes that the weights as they were take in memory meanwhile;
        compiled: steps of whole decoder layers that were compiled calls; hooked: those that were stock for a hook's sake;
        tokens: calls of the model whose layers were one compiled call; apart: steps that were not, by the reason.
        """
        steps, hooked = (sum(getattr(found, name) for _, found in self._compiled) for name in ("steps", "hooked"))
        tokens = sum(stack.tokens for _, stack in self._stack)
        apart = dict(sum((stack.apart for _, stack in self._stack), Counter()))
        packed = {"kind": self.kind, "layers": len(self._layers), "bytes": self.bytes, "left": dict(self.left)}
        compiled = steps + tokens * len(self._compiled)
        packed["originals"] = sum(layer.weight.nbytes for layer in self._layers) - self._originals.bytes
        return packed | {"compiled": compiled, "hooked": hooked, "tokens": tokens, "apart": apart}

    def changed(self) -> list[nn.Module]:
        """Return the modules that have a `forward` of ours."""
        return [*self._layers, *(module for module, _ in self._compiled + self._stack)]

    def undo(self) -> None:
        """Give the model back as it was; a second call does nothing."""
        for module in self.changed():
            vars(module).pop("forward", None)
        self._originals.restore()
        self._layers, self._compiled, self._stack = [], [], []

    def __enter__(self) -> "Packing":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.undo()


def pack_weights(model: PreTrainedModel, kind: str, originals: str | None = None) -> Packing:
    """Pack the weights of `model` in "int8" or "int4" until `undo`; "float": have our own kernels read them as they are.

    originals: "disk" has those that were packed in a file meanwhile (`attnpred.hf.originals`); None leaves them in memory.
    Raises `ConfigError`, `UnsupportedModelError`, `MissingExtraError`, `StoreError`.
    """
    check_place(originals, kind)
    if kind not in (*BITS, AS_THEY_ARE):
        raise ConfigError(
            f"got weights={kind!r}, expected one of {', '.join(map(repr, (*BITS, AS_THEY_ARE)))}, or None"
        )
    wanted, instead = f"weights={kind!r}", "leave weights out"
    if DIGEST != "numba":
        raise missing_extra("numba", "fast")
    if any(is_packed(module) for module in model.modules()):
        raise ConfigError(
            f"got {wanted} for a model whose weights are packed already, expected others: undo that first"
        )
    if getattr(model.config, "quantization_config", None) is not None or getattr(model, "is_quantized", False):
        raise UnsupportedModelError(f"got {wanted} for a quantized model, expected plain weights: {instead}")
    if model.training:
        raise UnsupportedModelError(f"got {wanted} for a model in training mode, expected model.eval(): {instead}")
    for parameter in model.parameters():
        if parameter.device.type != "cpu":
            raise UnsupportedModelError(
                f"got {wanted} for weights on {parameter.device}, expected all on the CPU: {instead}"
            )
        if parameter.ndim > 1 and parameter.dtype not in (torch.float32, torch.bfloat16):
            name = str(parameter.dtype).removeprefix("torch.")
            raise UnsupportedModelError(
                f"got {wanted} for weights in {name}, expected float32 or bfloat16: load the model with dtype='float32'"
            )
    return Packing(model, kind, originals)


def is_packed(module: nn.Module) -> bool:
    """Return whether the weight of this very module is packed."""
    return packed_kind(module) is not None


def copied_plain(packing: Packing | None, memo: dict[int, Any]) -> None:
    """Make the copies in `memo`, of what is packed, plain ones."""
    for module in [] if packing is None else packing.changed():
        vars(memo[id(module)]).pop("forward", None)


def _groups(module: nn.Module) -> Iterator[list[nn.Linear]]:
    """Yield the linear layers that are children of a module, those with the same input together."""
    children = {name: child for name, child in module.named_children() if isinstance(child, nn.Linear)}
    for names in FUSED:
        found = [children.pop(name) for name in names if name in children]
        if len({(layer.in_features, layer.weight.dtype) for layer in found}) == 1:
            yield found
        else:
            yield from ([layer] for layer in found)
    yield from ([layer] for layer in children.values())


def _is_plain(layer: nn.Linear) -> bool:
    """Return whether a call of the layer is a product with its weight and nothing else."""
    return type(layer) is nn.Linear and "forward" not in vars(layer) and type(layer.weight.data) is torch.Tensor
