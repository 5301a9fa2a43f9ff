"""The `forward` of a linear layer with a product of ours, and of layers that read the same input in one call.

Few rows of input go to the kernel (`attnpred.kernels.numba_linear`), more of them to torch, with the matrix unpacked piece
by piece: so no second copy of the weights is held, and both multiply with the same numbers. A weight may also be a plain
tensor, which is read where it is.
"""

from collections.abc import Sequence
from typing import Any, final

import torch
from torch import Tensor, nn

from attnpred.errors import ConfigError
from attnpred.hf.modes import attending_dtype, without_autocast
from attnpred.kernels.linear import Packed
from attnpred.kernels.numba_linear import MOST, Matrices
from attnpred.kernels.numba_unpack import unpack

FEW = 64
"""Rows of input up to which the kernel is called, `MOST` at a time (docs/LOG.md)."""
PIECE = 1 << 20
"""Numbers that are unpacked at once."""


class Together:
    """Layers of one input. The first that is called computes the products of all, and the others find theirs."""

    def __init__(self, layers: list[nn.Linear], weights: Sequence[Packed | Tensor]) -> None:
        self.weights, self.dtype = weights, layers[0].weight.dtype
        self.biases = [None if layer.bias is None else layer.bias.detach() for layer in layers]
        self.all = Matrices(weights, self.biases, self.dtype)
        pairs = zip(weights, self.biases, strict=True)
        self.each = [self.all] if len(weights) == 1 else [Matrices([one], [bias], self.dtype) for one, bias in pairs]
        self.known: tuple[Tensor, int, tuple[Tensor, ...]] | None = None

    def few(self, x: Tensor, number: int) -> Tensor:
        """Return x [..., width], up to `MOST` rows, times matrix `number`; the others know x by its being the same."""
        if len(self.each) == 1 or x.is_inference():  # which does not tell whether it was changed
            return self.each[number].product(self._rows(x))
        known = self.known
        if known is None or known[0] is not x or known[1] != x._version:
            known = x, x._version, self.all.product(self._rows(x)).split(self.all.rows, 1)
        self.known = None if number == len(self.each) - 1 else known
        return known[2][number]

    def several(self, x: Tensor, number: int) -> Tensor:
        """The same for more rows, some at a time."""
        return torch.cat([self.each[number].product(part) for part in self._rows(x).split(MOST)])

    def many(self, x: Tensor, number: int) -> Tensor:
        """The same by torch, with the matrix unpacked piece by piece."""
        weight, bias, x = self.weights[number], self.biases[number], self._rows(x)
        if isinstance(weight, Tensor):
            return nn.functional.linear(x, weight, bias)
        at_once = max(4, PIECE // weight.width // 4 * 4)
        scratch = torch.empty(min(at_once, weight.rows), weight.width, dtype=self.dtype, device="cpu")
        found = []
        for first in range(0, weight.rows, at_once):
            last = min(first + at_once, weight.rows)
            unpack(weight, first, last, scratch)
            own = None if bias is None else bias[first:last]
            found.append(nn.functional.linear(x, scratch[: last - first], own))
        return found[0] if len(found) == 1 else torch.cat(found, 1)

    def _rows(self, x: Tensor) -> Tensor:
        return x.detach().reshape(-1, self.all.width).to(self.dtype).contiguous()


@final
class PackedForward:
    """Stands for the `forward` of a layer: matrix `number` of those in `together`. A copy of the layer shares it."""

    __slots__ = ("_original", "_parameters", "_version", "kind", "number", "together")

    def __init__(self, together: Together, number: int, kind: str, layer: nn.Linear) -> None:
        self.together, self.number, self.kind = together, number, kind
        self._parameters, self._original, self._version = layer._parameters, layer.weight, version(layer.weight)

    def __call__(self, input: Tensor) -> Tensor:  # the name that nn.Linear has for it
        """Return what the layer makes of input [..., width]. Raises `ConfigError`."""
        x, together = input, self.together
        if x.requires_grad and torch.is_grad_enabled():
            raise ConfigError(
                "got a call that records gradients, expected none with packed weights: call the model under torch.no_grad()"
            )
        if self._parameters["weight"] is not self._original or version(self._original) != self._version:
            raise ConfigError(
                "got weights that were changed after they were packed, expected the same ones: detach the model before"
            )
        count = x.numel() // together.all.width
        if 0 < count <= MOST and x.dtype == together.dtype and not torch.is_autocast_enabled("cpu"):
            found = together.few(x, self.number)
        else:
            wanted = attending_dtype(x.device, x.dtype)
            with without_autocast(x.device):
                multiply = together.several if 0 < count <= FEW else together.many
                found = multiply(x, self.number).to(wanted)
        return found.view(*x.shape[:-1], found.shape[-1])

    def __deepcopy__(self, memo: dict[int, Any]) -> "PackedForward":
        return self

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise ConfigError("got packed weights to pickle, expected plain ones: detach the model first")


def version(tensor: Tensor) -> int | None:
    """Return how often a tensor was changed in place; None where nobody counts."""
    return None if tensor.is_inference() else tensor._version
