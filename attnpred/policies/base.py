"""What a policy is: it scores blocks. Everything else (top-k, sinks, recent window, budget, state) belongs to others.

A policy is a frozen dataclass of its hyper-parameters; it holds no state of a sequence. What it remembers is a `History`
of `state_rows` rows, which the decode step owns, feeds with `push` and shows in a `View`.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from attnpred.policies.select import Zone
from attnpred.predictor.history import History


@dataclass(frozen=True, slots=True)
class View:
    """What a policy may look at. `block_mass` computes the step's true attention per block, [B, Hs, N]: evaluation only."""

    history: History
    zone: Zone
    block_mass: Callable[[], Tensor] | None = None


class Policy(ABC):
    """Interface; concrete policies are final."""

    needs_query: ClassVar[bool] = False
    """The selection is made inside the step, from its own query, so nothing can be prefetched."""
    is_dense: ClassVar[bool] = False
    """Every step attends to everything."""

    def state_rows(self, history: int) -> int:
        """Return how many rows of history this policy keeps; 0 means that it needs no attention row at all."""
        return 0

    def push(self, history: History, rows: Tensor) -> None:
        """Take in new rows [B, Hs, R, N], oldest first."""
        history.push(rows)

    @abstractmethod
    def score(self, view: View) -> Tensor:
        """Return scores [B, Hs, N], higher is kept; only blocks between sinks and recent window matter."""
