"""How the keys and values of one block of one head, a *unit*, lie in a slow tier; and how a damaged unit is noticed.

`Int8` and `Fp8` keep one scale per token for its key and one for its value, in bfloat16. The scale is rounded to the
nearest bfloat16, and codes are made with the rounded one. Rounding it up would be the obvious way to clip nothing, but
nearest clips nothing either (a scale is off by less than 0.4%, and 127 * 1.004 < 127.5 still rounds to 127), and then the
largest number always has the largest code, so that the same scale comes out of what was decoded: encoding it once more
changes no bit of it, and a block that is written again loses nothing. (Rounded up, the largest code may be 126, and a block
would fade with every writing.)

`checks` notices a unit that changed on the way. It is multilinear hashing (Lemire and Kaser, 2014): 32-bit words times fixed
64-bit numbers, and the upper half of the sum; two different units agree with probability 2**-32, whatever the difference.
280 units of 4 KB take 0.3 ms. 64-bit words would take half, but miss pairs of changes in topmost bits, half of them or
all: and that is what a broken line of a memory bus makes.
"""

import math
from abc import ABC, abstractmethod
from functools import lru_cache
from importlib.util import find_spec
from typing import ClassVar, final

import torch
from torch import Tensor

from attnpred.errors import ConfigError, ShapeError
from attnpred.shapes import expect

_SMALLEST_SCALE = torch.finfo(torch.bfloat16).tiny  # still a normal number: rows of zeros divide by it, too
_HAS_NUMBA = find_spec("numba") is not None
_WORDS_AT_ONCE = 1 << 14  # below what torch would share out: several threads do this at once
"""Larger products may be memory that malloc gives back and gets anew each time: 1.9 ms instead of 0.3 ms, measured."""


class Codec(ABC):
    """Units of P keys [P, D] and P values [P, Dv] of `dtype`; n of them are uint8 [n, unit_bytes].

    You may assume: equal keys and values make equal units, padding included; nothing here loops over units.
    You must: leave `units` alone as long as you use what `decode` returned, which may be views of them; give units that
    start at a multiple of 8 bytes in memory that you allocated as a tensor.
    """

    is_exact: ClassVar[bool] = False  # whether decode gives back every bit

    def __init__(self, block_size: int, key_dim: int, value_dim: int, dtype: torch.dtype) -> None:
        self.block_size, self.dtype = block_size, dtype
        self._keys_shape, self._values_shape = (block_size, key_dim), (block_size, value_dim)
        self._layout = self._fields()
        self._used_bytes = sum(math.prod(shape) * kind.itemsize for kind, shape in self._layout)
        self.unit_bytes = -(-self._used_bytes // 8) * 8

    def encode(self, keys: Tensor, values: Tensor) -> Tensor:
        """Return the units of keys [n, P, D] and values [n, P, Dv]."""
        expect("keys", keys, -1, *self._keys_shape)
        expect("values", values, keys.shape[0], *self._values_shape)
        if {keys.dtype, values.dtype} != {self.dtype}:
            raise ShapeError(
                f"got keys of {keys.dtype} and values of {values.dtype}, expected {self.dtype}: convert them"
            )
        units = torch.empty(keys.shape[0], self.unit_bytes, dtype=torch.uint8, device=keys.device)
        units[:, self._used_bytes :] = 0
        self._fill(self._views(units), keys.detach(), values.detach())
        return units

    def decode(self, units: Tensor) -> tuple[Tensor, Tensor]:
        """Return keys [n, P, D] and values [n, P, Dv]."""
        expect("units", units, -1, self.unit_bytes)
        return self._read(self._views(units))

    def _views(self, units: Tensor) -> list[Tensor]:
        views, start = [], 0
        for dtype, shape in self._layout:
            end = start + math.prod(shape) * dtype.itemsize
            views.append(units[:, start:end].view(dtype).unflatten(1, shape))
            start = end
        return views

    @abstractmethod
    def _fields(self) -> list[tuple[torch.dtype, tuple[int, ...]]]:
        """Return what a unit is made of, widest type first so that each part is aligned."""

    @abstractmethod
    def _fill(self, views: list[Tensor], keys: Tensor, values: Tensor) -> None: ...

    @abstractmethod
    def _read(self, views: list[Tensor]) -> tuple[Tensor, Tensor]: ...


@final
class Exact(Codec):
    """Every bit as it is; `decode` returns views."""

    is_exact = True

    def _fields(self) -> list[tuple[torch.dtype, tuple[int, ...]]]:
        return [(self.dtype, self._keys_shape), (self.dtype, self._values_shape)]

    def _fill(self, views: list[Tensor], keys: Tensor, values: Tensor) -> None:
        views[0].copy_(keys)
        views[1].copy_(values)

    def _read(self, views: list[Tensor]) -> tuple[Tensor, Tensor]:
        return views[0], views[1]


class _Scaled(Codec):
    """One byte per number and a scale per token; a token with NaN or infinity decodes to NaN as a whole."""

    code: ClassVar[torch.dtype]
    top: ClassVar[int]  # the code of the largest number of a token

    def __init__(self, block_size: int, key_dim: int, value_dim: int, dtype: torch.dtype) -> None:
        if dtype not in (torch.float32, torch.bfloat16, torch.float16):
            raise ConfigError(f"got {dtype} to compress, expected float32, bfloat16 or float16: store it uncompressed")
        super().__init__(block_size, key_dim, value_dim, dtype)

    def _fields(self) -> list[tuple[torch.dtype, tuple[int, ...]]]:
        scales = [(torch.bfloat16, (self.block_size,))] * 2
        return [*scales, (self.code, self._keys_shape), (self.code, self._values_shape)]

    def _fill(self, views: list[Tensor], keys: Tensor, values: Tensor) -> None:
        for scales, codes, numbers in zip(views[:2], views[2:], (keys, values), strict=True):
            numbers = numbers.float()
            exact = numbers.abs().amax(-1).div_(self.top).clamp_(min=_SMALLEST_SCALE)
            scales.copy_(exact.masked_fill_(exact == torch.inf, torch.nan))
            codes.copy_(self._rounded(numbers / scales.float()[..., None]))

    def _read(self, views: list[Tensor]) -> tuple[Tensor, Tensor]:
        most = torch.finfo(self.dtype).max  # the top code may stand for a little more, with a scale that was rounded up
        keys, values = (
            self._numbers(codes, scales.float()[..., None]).clamp_(-most, most).to(self.dtype)
            for scales, codes in zip(views[:2], views[2:], strict=True)
        )
        return keys, values

    @abstractmethod
    def _rounded(self, numbers: Tensor) -> Tensor:
        """Round so that the conversion to `code` is exact, or leave the rounding to it; may be in place."""

    @abstractmethod
    def _numbers(self, codes: Tensor, scales: Tensor) -> Tensor:
        """Return codes [n, P, any] times scales [n, P, 1] in float32."""


@final
class Int8(_Scaled):
    """Integers from -127 to 127 times the scale: off by at most half a scale."""

    code, top = torch.int8, 127

    def _rounded(self, numbers: Tensor) -> Tensor:
        return numbers.round_()

    def _numbers(self, codes: Tensor, scales: Tensor) -> Tensor:
        return codes * scales


@final
class Fp8(_Scaled):
    """float8_e4m3fn times the scale, a token's largest number at 448: off by at most 1/16 of a number or 2**-10 scales."""

    code, top = torch.float8_e4m3fn, 448

    def _rounded(self, numbers: Tensor) -> Tensor:
        return numbers

    def _numbers(self, codes: Tensor, scales: Tensor) -> Tensor:
        # The bits of an e4m3 number, moved to where float16 has them, are that number / 256. torch converts one at a time
        # on a CPU: 0.9 ms for 280 blocks of 16 x 64, against 0.1 ms. (The bit below the sign comes from its extension.)
        bits = (codes.view(torch.int8).to(torch.int16) << 7) & ~0x4000
        return bits.view(torch.float16) * (scales * 256)


CODECS: dict[str | None, type[Codec]] = {None: Exact, "int8": Int8, "fp8": Fp8}


def checks(units: Tensor) -> Tensor:
    """Return a check value of each unit, int32 [n], for contiguous units, uint8 [n, a multiple of 8]."""
    words = units.view(torch.int32)
    first, weights = _weights(words.shape[1], units.device)
    if _HAS_NUMBA and units.device.type == "cpu":
        from attnpred.kernels.numba_read import unit_checks  # compiled when it is first needed

        found = torch.empty(words.shape[0], dtype=torch.int32, device="cpu")
        unit_checks(words.numpy(), weights.numpy(), first, found.numpy())
        return found
    step = max(1, _WORDS_AT_ONCE // words.shape[1] if units.device.type == "cpu" else words.shape[0])
    sums = torch.cat([(part * weights).sum(1) for part in words.split(step)])
    return ((sums + first) >> 32).to(torch.int32)


@lru_cache(maxsize=64)
def _weights(words: int, device: torch.device) -> tuple[int, Tensor]:
    # splitmix64: a formula and no generator of torch's, because check values are saved in files. The first number is
    # added, so that a unit and a check value that were both lost, and read as zeros, do not fit together.
    numbers = []
    for index in range(1, words + 2):
        z = index * 0x9E3779B97F4A7C15 % 2**64
        z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 % 2**64
        z = (z ^ z >> 27) * 0x94D049BB133111EB % 2**64
        numbers.append((z ^ z >> 31) - 2**63)  # less 2**63: into the range of int64
    return numbers[0], torch.tensor(numbers[1:], dtype=torch.int64, device=device)
