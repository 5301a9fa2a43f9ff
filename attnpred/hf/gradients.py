"""A cache keeps keys and values, not how they were computed: a gradient through it is refused when it is asked for.

A call that nobody asks for its gradient goes on as ever, whether gradients are switched on or not.
"""

from typing import Any

import torch
from torch import Tensor

from attnpred.errors import UnsupportedModelError


class _Refusal(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, output: Tensor, *sources: Tensor) -> Tensor:
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        raise UnsupportedModelError(
            "got a gradient through a call with a past, expected one of a whole text at once: train without a cache"
        )


def without_gradient(output: Tensor, *sources: Tensor) -> Tensor:
    """Return `output`, computed from `sources` and a past; its gradient is an `UnsupportedModelError`, not a wrong one."""
    if torch.is_grad_enabled() and any(source.requires_grad for source in sources):
        refused: Tensor = _Refusal.apply(output, *sources)
        return refused
    return output
