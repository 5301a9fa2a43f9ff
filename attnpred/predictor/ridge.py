"""Weights of a few features, found in closed form: ridge regression towards a prior, for every head on its own.

With weighted rows x and values y, A = sum w x x' and b = sum w x y; the weights that miss least, and do not leave the prior
p without need, solve (A + s I) W = b + s p (Hoerl and Kennard, 1970). A and b are sums, so rows may come at any time and
in any number, and nothing of a row is kept.
"""

from collections.abc import Sequence
from typing import ClassVar, final

import torch
from torch import Tensor

from attnpred.predictor.memory import Columns, Memory

STRENGTH = 1.0
"""What the prior weighs; a row weighs the root of its attention, and a head's rows of a prompt some hundreds."""


@final
class Ridge(Memory):
    """The sums of [B, Hs] regressions of F features, [B, Hs, F, F + 1]; empty until rows were added."""

    remembers: ClassVar[tuple[str, ...]] = ("sums",)

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        self.sums = torch.empty(0, dtype=torch.float32, device="cpu")

    def tables(self) -> Sequence[Columns]:
        return ()

    def select(self, rows: Tensor) -> None:
        self._map(lambda tensor: tensor[rows.to(tensor.device)])

    def repeat(self, times: int) -> None:
        self._map(lambda tensor: tensor.repeat_interleave(times, 0))

    def add(self, features: Tensor, values: Tensor, weights: Tensor) -> None:
        """Take in features [B, Hs, F, n] of n observations, their values and weights [B, Hs, n]."""
        weighed = features * weights[:, :, None]
        sums = torch.cat((weighed @ features.transpose(-1, -2), weighed @ values[..., None]), -1)
        self.sums = self.sums + sums if self.sums.numel() else sums

    def solve(self, prior: Tensor) -> Tensor:
        """Return the weights [B, Hs, F] for a prior [F]."""
        given, told = self.sums[..., :-1].double(), self.sums[..., -1].double()
        strength = STRENGTH * torch.eye(prior.numel(), dtype=torch.float64, device=given.device)
        return torch.linalg.solve(given + strength, told + STRENGTH * prior.double()).float()
