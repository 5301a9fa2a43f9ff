"""The rest: what a step leaves out, added to its output as an estimate, from a few numbers of each query head.

With Z the sum of exponentials over what was attended and Z' that over the rest, the full output is (1 - s) o + s o' for the
share s = Z' / (Z + Z'). `attnpred.predictor.rest` says where these numbers come from and why they suffice:

    log Z' = level + slope * (query . mean key),    output + share * (vector - weight * output)

No key or value of the rest is read.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor


class RestTerms(NamedTuple):
    """Of each query head: level, slope, weight [B, Hq], vector [B, Hq, Dv]; of each kv head: mean_key [B, Hkv, D]."""

    level: Tensor
    slope: Tensor
    mean_key: Tensor
    vector: Tensor
    weight: Tensor


def add_rest_reference(output: Tensor, query: Tensor, normaliser: Tensor, terms: RestTerms) -> tuple[Tensor, Tensor]:
    """Return the output [B, Hq, Dv] with the rest, and the share [B, Hq] that the rest is estimated to have.

    output [B, Hq, Dv] of query [B, Hq, D] over what was attended, and its log-sum-exp [B, Hq].
    """
    found, shares = torch.empty_like(output), torch.empty_like(normaliser, dtype=torch.float32)
    batch, heads, _ = query.shape
    for b in range(batch):
        for h in range(heads):
            key = terms.mean_key[b, h * terms.mean_key.shape[1] // heads]
            level = float(terms.level[b, h] + terms.slope[b, h] * (query[b, h].float() @ key))
            share = 1 / (1 + math.exp(min(80.0, float(normaliser[b, h]) - level)))
            shares[b, h] = share
            own = output[b, h].float()
            found[b, h] = (own + share * (terms.vector[b, h] - float(terms.weight[b, h]) * own)).to(output.dtype)
    return found, shares


def add_rest(output: Tensor, query: Tensor, normaliser: Tensor, terms: RestTerms) -> tuple[Tensor, Tensor]:
    """Same as `add_rest_reference`, all heads at once."""
    batch, heads, dim = query.shape
    grouped = query.float().view(batch, terms.mean_key.shape[1], -1, dim)
    toward = (grouped @ terms.mean_key[..., None]).view(batch, heads)
    share = torch.sigmoid(torch.addcmul(terms.level, terms.slope, toward) - normaliser)
    own = output.float()
    added = torch.addcmul(own, share[..., None], torch.addcmul(terms.vector, terms.weight[..., None], own, value=-1.0))
    return added.to(output.dtype), share
