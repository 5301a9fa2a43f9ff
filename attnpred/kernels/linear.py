"""Matrices of a model in few bits, and what they stand for: the definition of correct for a product with them.

A row's numbers are taken 32 at a time, a *group*. Each group has a scale in fp16, and for 4 bits an offset too, as the
blocks of GGUF's Q8_0 and Q4_1 have. What four rows have for the same group lies together, codes apart from scales: so a
kernel reads few streams, and sums across a register once in a row (docs/LOG.md has the layouts that were slower).

    int8   weight = scale * code                codes -127 to 127        34 bytes for 32 weights
    int4   weight = scale * code + offset       codes 0 to 15            20 bytes for 32 weights
"""

from dataclasses import dataclass

import torch
from torch import Tensor

GROUP = 32
BITS = {"int8": 8, "int4": 4}
"""What weights may be packed in."""


@dataclass(frozen=True, slots=True, eq=False)
class Packed:
    """A matrix [rows, width] in few bits, by rows.

    codes int8 [fours, groups, 4 pieces, 4 rows, 8], or int16 [fours, groups, 4 rows, 8] with a piece in every four bits, the
    first in the lowest; scales and offsets fp16 [fours, groups, 4 rows], offsets of 4 bits alone. What is short of whole
    groups and fours is zero.
    """

    bits: int
    rows: int
    width: int
    codes: Tensor
    scales: Tensor
    offsets: Tensor | None

    def bytes(self) -> int:
        """Return how many bytes a product reads."""
        return self.codes.nbytes + self.scales.nbytes + (0 if self.offsets is None else self.offsets.nbytes)


def pack(weight: Tensor, bits: int, at_once: int = 4096) -> Packed:
    """Return weight [rows, width] in 8 or 4 bits, each number the nearest; `at_once` rows, whole fours, at a time."""
    rows, width = weight.shape
    fours, groups = -(-rows // 4), -(-width // GROUP)
    codes = (
        torch.empty(fours, groups, 4, 4, 8, dtype=torch.int8, device=weight.device)
        if bits == 8
        else torch.empty(fours, groups, 4, 8, dtype=torch.int16, device=weight.device)
    )
    scales = torch.empty(fours, groups, 4, dtype=torch.float16, device=weight.device)
    offsets = torch.empty_like(scales) if bits == 4 else None
    for first in range(0, rows, at_once):
        part = slice(first // 4, (first + at_once) // 4)
        chunk = weight[first : first + at_once].detach().float()
        chunk = torch.nn.functional.pad(chunk, (0, groups * GROUP - width, 0, -len(chunk) % 4))
        chunk = chunk.view(-1, 4, groups, GROUP).transpose(1, 2)
        if offsets is None:
            scales[part] = chunk.abs().amax(-1) / 127
            steps = (chunk / _divisor(scales[part])).round_().clamp_(-127, 127)
            codes[part] = steps.unflatten(-1, (4, 8)).transpose(2, 3)
        else:
            least = chunk.amin(-1)
            offsets[part], scales[part] = least, (chunk.amax(-1) - least) / 15
            steps = ((chunk - offsets[part].float()[..., None]) / _divisor(scales[part])).round_().clamp_(0, 15)
            a, b, c, d = steps.int().split(GROUP // 4, -1)
            codes[part] = (a | b << 4 | c << 8 | d << 12).short()
    return Packed(bits, rows, width, codes, scales, offsets)


def unpack(packed: Packed, first: int = 0, last: int | None = None, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return the rows from `first`, whole fours, up to `last` as they are meant, [rows, width]."""
    last = packed.rows if last is None else min(last, packed.rows)
    part = slice(first // 4, -(-last // 4))
    codes, scales = packed.codes[part], packed.scales[part].float()[..., None]
    if packed.offsets is None:
        weight = codes.transpose(2, 3).flatten(3) * scales
    else:
        steps = torch.cat([codes >> shift & 15 for shift in (0, 4, 8, 12)], -1)
        weight = steps * scales + packed.offsets[part].float()[..., None]
    return weight.transpose(1, 2).flatten(2).flatten(0, 1)[: last - first, : packed.width].to(dtype)


def product(x: Tensor, weight: Packed | Tensor, bias: Tensor | None = None) -> Tensor:
    """Return x [..., width] times the matrix, plus bias: [..., rows], of x's type. Slow, in fp32."""
    matrix = unpack(weight) if isinstance(weight, Packed) else weight.float()
    return torch.nn.functional.linear(x.float(), matrix, None if bias is None else bias.float()).to(x.dtype)


def _divisor(scales: Tensor) -> Tensor:
    wide = scales.float()
    return torch.where(wide == 0, 1, wide)[..., None]
