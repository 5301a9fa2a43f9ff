"""Four-bit codes of small vectors, and their products with a query: what resident digests are made of.

A number in units of about one standard deviation is rounded to one of 16 levels, STEP apart, which is the best uniform
quantiser of 16 levels for a Gaussian (its error is about a hundredth of the variance). Two codes share a byte:
dimension i in the low half, dimension i + r/2 in the high half, the latter less 8 so that the byte as a signed number
is 16 * (high - 8) + low.

That makes the product cheap without unpacking both halves: with b the signed byte,

    sum of q_low * low + q_high * high  =  b . (q_high / 16)  +  low . (q_low - q_high / 16)  +  a constant of the query

so one mask and two int8 matrix products do it. The query is rounded to int8 for them, with a scale of its own for each
product. `digest_shares_reference` is what the result has to be close to.
"""

import math

import torch
from torch import Tensor

STEP = 0.335
_MIDDLE = 7.5

FLOOR = -14.0
"""Logarithms of attention below this are all alike: about a millionth."""
SMALLEST = math.exp(FLOOR)
DOUBT = 2.0
"""A block's forecast is never further below the logarithm of its share by digest than this."""


def pack(values: Tensor) -> Tensor:
    """Return int8 codes [..., r / 2] of `values` [..., r], r even."""
    half = values.shape[-1] // 2
    codes = (values / STEP + _MIDDLE).round_().clamp_(0, 15).to(torch.int16)
    low, high = codes[..., :half], codes[..., half:]
    return ((high - 8) * 16 + low).to(torch.int8)


def unpack(codes: Tensor) -> Tensor:
    """Return fp32 [..., r], the values that `codes` [..., r / 2] stand for."""
    low = (codes & 15).float()
    high = (codes.float() - low) / 16 + 8
    return (torch.cat((low, high), -1) - _MIDDLE) * STEP


def digest_shares_reference(query: Tensor, codes: Tensor, vectors: int) -> Tensor:
    """Return fp32 [X, N]: the logarithm of the attention that the codes say each block gets, summed over the group.

    query [X, G, r], scale included; codes [X, N * vectors, r / 2], `vectors` successive ones for each block. The attention
    of one query is a softmax over all vectors; a block has the sum of its own. Never below `FLOOR`.
    """
    logits = query.float() @ unpack(codes).transpose(-1, -2)
    return torch.softmax(logits, -1).sum(1).unflatten(-1, (-1, vectors)).sum(-1).log().clamp_min(FLOOR)


def digest_shares(query: Tensor, codes: Tensor, vectors: int) -> Tensor:
    """Same as `digest_shares_reference`, with int8 products where the device has them; the codes of an X are contiguous."""
    # Elsewhere int8 products ask for sizes that a decode step does not have; of single bytes torch's are wrong (2.13).
    if codes.device.type != "cpu" or codes.shape[-1] == 1:
        return digest_shares_reference(query, codes, vectors)
    half, group = codes.shape[-1], query.shape[1]
    low, high = query.float().mul(STEP).split(half, -1)
    # What is the same for all vectors, the offsets of both halves, does not change a softmax.
    upper, upper_scale = _to_int8(high / 16)
    lower, lower_scale = _to_int8(low - high / 16)
    out = torch.empty(codes.shape[0], codes.shape[1] // vectors, dtype=torch.float32, device=codes.device)
    for i in range(codes.shape[0]):
        first = torch._int_mm(upper[i], codes[i].t())
        logits = first * upper_scale[i]
        logits.addcmul_(torch._int_mm(lower[i], (codes[i] & 15).t()), lower_scale[i])
        shares = torch.softmax(logits, -1)
        torch.sum(shares.view(group, -1, vectors), (0, 2), out=out[i])
    return out.clamp_(min=SMALLEST).log_()


def _to_int8(values: Tensor) -> tuple[Tensor, Tensor]:
    """Return int8 values and their scale [..., 1], by the largest of the last dimension."""
    scale = values.abs().amax(-1, keepdim=True).clamp_min(1e-20) / 127
    return (values / scale).round_().to(torch.int8), scale
