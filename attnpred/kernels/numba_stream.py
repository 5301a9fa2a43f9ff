"""What `attnpred.kernels.stream` does with all blocks at every step, by numba: one pass for each head, heads on threads.

The functions get addresses and sizes, in `fields`: at a few microseconds of work, handing over an array costs as much.
"""

from typing import Any

import numba
import numpy as np
import torch
from torch import Tensor

from attnpred.kernels import stream
from attnpred.kernels.digest import DOUBT, FLOOR
from attnpred.kernels.numba_codes import EXP2, LOG
from attnpred.kernels.numba_team import share_out
from attnpred.kernels.numba_tools import address, compiled, pointer, take, threads

_FLOOR, _DOUBT = np.float32(FLOOR), np.float32(DOUBT)
FIELDS = 16
WEIGHTS = 4
"""Of estimate, average, distance and one."""
RATE_UNIT = 2.0**-24
_PAYS = 1 << 14
"""Numbers, of all heads, from which on it pays to have several threads: about 10 microseconds, 50 where data is cold."""


@numba.njit(fastmath={"reassoc", "contract"})
def weigh_row(estimate: Any, past: Any, weights: Any, distance: Any, out: Any) -> None:
    """Write to out [n] what `stream.weigh` makes of estimate, past and distance [n] with weights [4]."""
    a, b, z, least = weights[0], weights[1], weights[2], weights[3] + _DOUBT
    for i in range(out.size):
        out[i] = max(a * estimate[i] + b * past[i] + z * distance[i], estimate[i] - least)


@compiled("void(CPointer(int64))", to_address=True)
def _weigh_heads(data: Any) -> None:
    """Fields: taken, rows, first, last, blocks, known, capacity; addresses as in `weigh`."""
    f = numba.carray(data, FIELDS)
    first, last, blocks, known, capacity = f[2], f[3], f[4], f[5], f[6]
    while True:
        head = take(f.ctypes.data)
        if head >= f[1]:
            break
        given = numba.carray(pointer(f[7] + head * known * 4), known, np.float32)
        past = numba.carray(pointer(f[8] + head * capacity * 4), capacity, np.float32)
        weights = numba.carray(pointer(f[9] + head * WEIGHTS * 4), WEIGHTS, np.float32)
        distance = numba.carray(pointer(f[10]), last - first, np.float32)
        out = numba.carray(pointer(f[11] + head * blocks * 4), blocks, np.float32)
        out[:first] = 0
        out[last:] = 0
        weigh_row(given[first:last], past[first:last], weights, distance, out[first:last])


@numba.njit(fastmath={"reassoc", "contract"})
def _average(past: Any, row: Any, rate: Any, bits: Any) -> None:
    """Bring row [n] into past [n], both logarithms; row is scratch then, and bits the same memory as integers."""
    # past + log(1 + rate * (exp(row - past) - 1)), by polynomials on the bits of numbers, which become vectors.
    wholes = np.empty(row.size, np.int32)
    for i in range(row.size):
        power = (row[i] - past[i]) * np.float32(1.4426950408889634)
        whole = np.floor(power + np.float32(0.5))
        wholes[i] = np.int32(whole) + np.int32(127)
        row[i] = power - whole
    for i in range(row.size):
        x, y = row[i], np.float32(EXP2[-1])
        for k in range(len(EXP2) - 2, -1, -1):
            y = y * x + np.float32(EXP2[k])
        row[i] = y
    for i in range(row.size):
        bits[i] += (wholes[i] - np.int32(127)) << np.int32(23)
    for i in range(row.size):
        row[i] = row[i] * rate + (np.float32(1) - rate)
    for i in range(row.size):
        exponent = (bits[i] - np.int32(0x3F3504F3)) >> np.int32(23)  # of a mantissa between the roots of 1/2 and 2
        wholes[i] = exponent
        bits[i] -= exponent << np.int32(23)
    for i in range(row.size):
        x, y = row[i] - np.float32(1), np.float32(LOG[6])
        for k in range(5, -1, -1):
            y = y * x + np.float32(LOG[k])
        past[i] = max(_FLOOR, past[i] + (y * x + np.float32(wholes[i]) * np.float32(0.6931471805599453)))


@compiled("void(CPointer(int64))", to_address=True)
def remember_heads(data: Any) -> None:
    """Fields: taken, rows, blocks, known, capacity, chosen; addresses as in `remember`; the rate in `RATE_UNIT`s."""
    f = numba.carray(data, FIELDS)
    blocks, known, capacity, chosen = f[2], f[3], f[4], f[5]
    rate = np.float32(f[12]) * np.float32(RATE_UNIT)
    row = np.empty(blocks, np.float32)
    bits = row.view(np.int32)
    distance = numba.carray(pointer(f[9]), known, np.float32)
    while True:
        head = take(f.ctypes.data)
        if head >= f[1]:
            break
        past = numba.carray(pointer(f[6] + head * capacity * 4), capacity, np.float32)[:blocks]
        estimate = numba.carray(pointer(f[7] + head * known * 4), known, np.float32)
        weights = numba.carray(pointer(f[8] + head * WEIGHTS * 4), WEIGHTS, np.float32)
        selection = numba.carray(pointer(f[10] + head * chosen * 8), chosen, np.int64)
        maxima = numba.carray(pointer(f[11] + head * chosen * 4), chosen, np.float32)
        weigh_row(estimate, past[:known], weights, distance, row[:known])
        for i in range(known):
            row[i] = min(np.float32(0), max(_FLOOR, row[i] + weights[3]))
        row[known:] = _FLOOR
        for i in range(chosen):
            row[max(0, selection[i])] = max(_FLOOR, np.log(max(maxima[i], np.float32(1e-30))))
        _average(past, row, rate, bits)


@numba.njit
def _threshold(keys: Any, count: int) -> int:
    """Return a number below which none of the `count` largest keys lies, and above which fewer than `count` do, or all."""
    # Counting what is above a number is a few instructions for 16 of them, so bisection beats moving them about.
    low, high = np.int32(2**31 - 1), np.int32(-(2**31))
    for i in range(keys.size):
        low, high = min(low, keys[i]), max(high, keys[i])
    least, most = int(low), int(high) + 1  # at least `count` are not below least, fewer are not below most
    while most - least > 1:
        middle, found = (least + most) // 2, np.int32(0)
        for i in range(keys.size):
            found = np.int32(found + (keys[i] >= np.int32(middle)))
        if found < count:
            most = middle
        else:
            least = middle
            if found == count:
                break
    return least


@numba.njit
def choose_row(scores: Any, sinks: int, first_recent: int, blocks: int, free: int, out: Any) -> None:
    """Write to out [sinks + free + blocks - first_recent] what `choose` returns; scores as integers, of the middle alone."""
    for i in range(sinks):
        out[i] = i
    for i in range(first_recent, blocks):
        out[sinks + free + i - first_recent] = i
    if free == 0:
        return
    keys = np.empty(scores.size, np.int32)
    for i in range(keys.size):  # integers in the order of the numbers
        keys[i] = scores[i] ^ ((scores[i] >> np.int32(31)) & np.int32(0x7FFFFFFF))
    least, kept = _threshold(keys, free), 0
    for i in range(keys.size):
        if keys[i] > least:
            out[sinks + kept] = sinks + i
            kept += 1
    for i in range(keys.size):
        if kept == free:
            break
        if keys[i] == least:
            out[sinks + kept] = sinks + i
            kept += 1


@compiled("void(CPointer(int64))", to_address=True)
def _choose_heads(data: Any) -> None:
    """Fields: taken, rows, sinks, first_recent, blocks, free, stride of a row of scores; addresses as in `choose`."""
    f = numba.carray(data, FIELDS)
    sinks, first_recent, blocks, free, stride = f[2], f[3], f[4], f[5], f[6]
    size = sinks + free + blocks - first_recent
    while True:
        head = take(f.ctypes.data)
        if head >= f[1]:
            break
        scores = numba.carray(pointer(f[7] + (head * stride + sinks) * 4), first_recent - sinks, np.int32)
        out = numba.carray(pointer(f[8] + head * size * 8), size, np.int64)
        choose_row(scores, sinks, first_recent, blocks, free, out)


@compiled("void(int64, int64, int64, int64[::1])")
def _run(parallel: int, count: int, work: int, fields: Any) -> None:
    share_out(parallel, count, work, fields.ctypes.data)


def _shared_out(work: Any, numbers: int, *fields: int) -> None:
    """Do `work` for all heads, of so many numbers together; the first two fields are 0 and how many heads there are."""
    told = np.zeros(FIELDS, np.int64)
    told[: len(fields)] = fields
    _run(*threads(numbers >= _PAYS), work.address, told)


def weigh(
    estimate: Tensor, past: Tensor, weights: Tensor, distance: Tensor, first: int, last: int, blocks: int
) -> Tensor:
    """Same as `stream.weigh`; `past` is in one piece."""
    if past.device.type != "cpu":
        return stream.weigh(estimate, past, weights, distance, first, last, blocks)
    known, capacity = estimate.shape[2], past.shape[3]
    assert 0 <= first <= last <= min(known, capacity, blocks)  # nothing below looks at it again
    assert past.is_contiguous() and distance.numel() == last - first and weights.shape[2] == WEIGHTS
    given, own, far = estimate.contiguous(), weights.contiguous(), distance.contiguous()
    out = torch.empty(*estimate.shape[:2], blocks, dtype=torch.float32, device="cpu")
    _shared_out(
        _weigh_heads, out.numel(), 0, out.shape[0] * out.shape[1], first, last, blocks, known, capacity,
        *(address(x, torch.float32) for x in (given, past, own, far, out)),
    )  # fmt: skip
    return out


def remember(
    past: Tensor, rate: float, blocks: int, estimate: Tensor, weights: Tensor, distance: Tensor, selection: Tensor,
    maxima: Tensor,
) -> None:  # fmt: skip
    """Same as `stream.remember`; `past` is in one piece."""
    if past.device.type != "cpu":
        return stream.remember(past, rate, blocks, estimate, weights, distance, selection, maxima)
    known, capacity, chosen = estimate.shape[2], past.shape[3], selection.shape[2]
    assert known <= blocks <= capacity and past.is_contiguous() and weights.shape[2] == WEIGHTS
    given, own, far = estimate.contiguous(), weights.contiguous(), distance.contiguous()
    ids, found = selection.contiguous(), maxima.float().contiguous()
    _shared_out(
        remember_heads, 4 * given.numel(), 0, past.shape[0] * past.shape[1], blocks, known, capacity, chosen,
        *(address(x, torch.float32) for x in (past, given, own, far)), address(ids, torch.int64), address(found, torch.float32),
        round(rate / RATE_UNIT),
    )  # fmt: skip


def choose(scores: Tensor, sinks: int, first_recent: int, blocks: int, free: int) -> Tensor:
    """Same as `stream.choose`."""
    rows = scores.stride(0) == scores.stride(1) * scores.shape[1] or scores.shape[0] == 1
    if scores.device.type != "cpu" or scores.dtype != torch.float32 or scores.stride(2) != 1 or not rows:
        return stream.choose(scores, sinks, first_recent, blocks, free)
    assert 0 <= sinks <= first_recent <= scores.shape[2] and 0 <= free <= first_recent - sinks
    out = torch.empty(*scores.shape[:2], sinks + free + blocks - first_recent, dtype=torch.int64, device="cpu")
    _shared_out(
        _choose_heads, 2 * scores.numel(), 0, out.shape[0] * out.shape[1], sinks, first_recent, blocks, free, scores.stride(1),
        address(scores, torch.float32), address(out, torch.int64),
    )  # fmt: skip
    return out
