"""`Rest`: what a head gets from the tokens that its steps leave out, learned from rows of which everything is known.

The rest of a context is thousands of tokens with little attention each, so its part of the output changes little from step
to step: a vector for each query head says more of it than a mean value of every block, which hides what is attended
(docs/LOG.md, 2026-11-28). Its share of the attention does change, with the query. It is the sum of many exponentials of
products with keys, whose logarithm is near to a linear function of the query's product with their mean.

Known rows are a prompt's last ones: their full output, and the output and log-sum-exps of what the policy would have
attended to. Two least-squares fits per query head, in closed form, from sums:

* level and slope, of the logarithm of the rest's sum over the product with the mean key;
* vector and weight, of what is missing in the output: share * (vector - weight * output), each row by the length of its
  full output. A weight below one is how far the share, or the vector, is to be believed.

The sums of earlier prompts count half beside those of a new one.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple, final

import torch
from torch import Tensor

from attnpred.kernels.rest import RestTerms
from attnpred.predictor.memory import Columns, Memory

KEEP = 0.5
"""What earlier rows weigh beside new ones."""
SMALLEST = 1e-6
"""The smallest share of the rest: below, a difference of two log-sum-exps in fp32 says nothing."""
LEAST = 1e-4
"""Of all rows together: below, nothing is left out that is worth an estimate."""
NOWHERE = -1e4
"""The level of a head of which nothing is known: its rest has no share."""
STRENGTH = 1.0
"""Of the prior of the slope, one, in squared logits."""
SHRINK = 1e-3
"""Of the prior of vector and weight, which is no change: squared shares, for each row."""


class Known(NamedTuple):
    """Rows of which everything is known: query [B, Hq, R, D]; output and log-sum-exp of everything, and of what would have
    been attended to, [B, Hq, R, Dv] and [B, Hq, R]; mean_key [B, Hkv, D], scaled; counts [B or 1, R]: 0 for padding."""

    query: Tensor
    full: Tensor
    full_normaliser: Tensor
    output: Tensor
    normaliser: Tensor
    mean_key: Tensor
    counts: Tensor


@final
class Rest(Memory):
    """What is known of the rest, of one layer and one sequence."""

    remembers: ClassVar[tuple[str, ...]] = ("mean_key", "levels", "outputs", "vectors")

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        none = torch.empty(0, dtype=torch.float32, device="cpu")
        self.mean_key = none  # [B, Hkv, D]
        self.levels = none  # sums [B, Hq, 5]: of the share, and times that of x, y, x x and x y
        self.outputs = none  # sums [B, Hq, 4]: of 1, share share, own own and own missing, by lengths
        self.vectors = none  # sums [B, Hq, 3, Dv]: of share missing, share own, by lengths, and the own output
        self._terms: RestTerms | None = None

    def tables(self) -> Sequence[Columns]:
        return ()

    def bytes(self) -> int:
        """Bytes that a step reads of it."""
        return 0 if self.terms is None else sum(term.numel() * term.element_size() for term in self.terms)

    def restore(self, state: Mapping[str, Any]) -> None:
        super().restore(state)
        self._terms = None

    def select(self, rows: Tensor) -> None:
        self._change(lambda tensor: tensor[rows.to(tensor.device)])

    def repeat(self, times: int) -> None:
        self._change(lambda tensor: tensor.repeat_interleave(times, 0))

    def _change(self, change: Callable[[Tensor], Tensor]) -> None:
        self._map(change)
        self._terms = None

    def learn(self, known: Known) -> None:
        """Take in rows."""
        counts = known.counts[:, None]
        query, full, total, own_output, normaliser = (
            x.float().masked_fill(known.counts.view(-1, 1, x.shape[2], *[1] * (x.ndim - 3)) == 0, 0.0)
            for x in known[:5]
        )
        share = (1 - torch.exp(normaliser - total)).clamp_min(SMALLEST) * counts
        grouped = query.unflatten(1, (known.mean_key.shape[1], -1))
        x = (grouped @ known.mean_key[:, :, None, :, None]).flatten(1, 2)[..., 0]
        y = total + share.clamp_min(SMALLEST).log()
        parts = share, share * x, share * y, share * x * x, share * x * y
        self.levels = _added(self.levels, torch.stack([part.sum(2) for part in parts], -1))
        self.mean_key = known.mean_key
        level, slope = self._line()
        share = torch.sigmoid(level[..., None] + slope[..., None] * x - normaliser) * counts
        lengths = counts / full.norm(dim=-1).clamp_min(1e-9)
        share, lengths = (share * lengths)[..., None], lengths[..., None]
        own, missing = share * own_output, (full - own_output) * lengths
        sums = (lengths**2)[..., 0], (share**2)[..., 0], (own**2).sum(-1), (own * missing).sum(-1)
        self.outputs = _added(self.outputs, torch.stack([part.sum(2) for part in sums], -1))
        vectors = share * missing, share * own, own_output * lengths**2
        self.vectors = _added(self.vectors, torch.stack([part.sum(2) for part in vectors], 2))
        self._terms = None

    @property
    def terms(self) -> RestTerms | None:
        """What a step needs to know, or None before there were any rows."""
        if self._terms is None and self.levels.numel():
            level, slope = self._line()
            rows, shares, own, both = self.outputs.unbind(-1)
            missing, shown, mean = self.vectors.unbind(2)
            prior = SHRINK * rows[..., None]
            size = (shares[..., None] + prior).clamp_min(1e-20)
            # vector = fixed + weight * moving, the best for a weight; then the weight
            fixed, moving = missing / size, (shown + SHRINK * mean) / size
            told = both - (missing * moving + shown * fixed).sum(-1) + shares * (fixed * moving).sum(-1)
            square = own - 2 * (shown * moving).sum(-1) + shares * (moving * moving).sum(-1)
            believed = SHRINK * own + 1e-20
            weight = ((believed - told) / (square.clamp_min(0) + believed)).clamp(0.0, 1.5)
            vector = fixed + weight[..., None] * moving
            self._terms = RestTerms(level, slope, self.mean_key, vector.contiguous(), weight)
        return self._terms

    def _line(self) -> tuple[Tensor, Tensor]:
        """Return level and slope [B, Hq] of the logarithm of the rest's sum."""
        weight, x, y, xx, xy = self.levels.unbind(-1)
        size = weight.clamp_min(1e-20)
        slope = (xy - x * y / size + STRENGTH) / ((xx - x * x / size).clamp_min(0) + STRENGTH)
        slope = slope.clamp(0.0, 1.5)
        level = (y - slope * x) / size
        return torch.where(weight > LEAST, level, NOWHERE).contiguous(), slope.contiguous()


def _added(sums: Tensor, new: Tensor) -> Tensor:
    return new + KEEP * sums if sums.numel() else new
