"""`predicted`: AttentionPredictor (arXiv 2502.04077). A small network forecasts the next row from the last H rows.

Sink and recent columns are cut off before the network sees the history, as published: they are kept anyway, and their
large values would drown the rest.
"""

from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from attnpred.policies.base import Policy, View
from attnpred.predictor.pretrained import Predictor


@final
@dataclass(frozen=True, slots=True)
class Predicted(Policy):
    """Score a block by the predictor's forecast of its next value."""

    predictor: Predictor

    def state_rows(self, history: int) -> int:
        return history

    @torch.no_grad()
    def score(self, view: View) -> Tensor:
        rows, zone = view.history.ordered(), view.zone
        rows = torch.nn.functional.pad(rows, (0, zone.blocks - rows.shape[-1]))
        device = next(self.predictor.parameters()).device  # layers may lie on several devices, the network lies on one
        scores = self.predictor(rows[..., zone.sinks : zone.first_recent].to(device))
        return torch.nn.functional.pad(scores, (zone.sinks, zone.blocks - zone.first_recent))
