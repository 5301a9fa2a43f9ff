"""What `attnpred.kernels.stream` does with all blocks at every step, by numba: one pass for each head, heads on threads.

The functions get addresses and sizes, in `fields`: at a few microseconds of work, handing over an array costs as much.
"""

from typing import Any

import numba
import numpy as np
import torch
from torch import Tensor

from attnpred.kernels import stream
from attnpred.kernels.digest import FLOOR
from attnpred.kernels.numba_tools import address, compiled, pointer, share_out, take, threads

_FLOOR = np.float32(FLOOR)
_FIELDS = 16
_PAYS = 1 << 14
"""Numbers, of all heads, from which on it pays to have several threads: about 10 microseconds, 50 where data is cold."""


@numba.njit
def weigh_row(estimate: Any, peaks: Any, weights: Any, distance: Any, out: Any) -> None:
    """Write to out [n] the weighted sum of estimate [n], peaks [T, n] and distance [n]; weights [2 + T]."""
    a, z = weights[0], weights[weights.size - 1]
    for i in range(out.size):
        out[i] = a * estimate[i] + z * distance[i]
    for t in range(peaks.shape[0]):
        b, past = weights[1 + t], peaks[t]
        for i in range(out.size):
            out[i] += b * past[i]


@compiled("void(CPointer(int64))", to_address=True)
def _weigh_heads(data: Any) -> None:
    """Fields: taken, rows, first, last, blocks, known, capacity, rates, heads of weights; addresses as in `weigh`."""
    f = numba.carray(data, _FIELDS)
    first, last, blocks, known, capacity, rates, own_weights = f[2], f[3], f[4], f[5], f[6], f[7], f[8]
    while True:
        head = take(f.ctypes.data)
        if head >= f[1]:
            break
        given = numba.carray(pointer(f[9] + head * known * 4), known, np.float32)
        peaks = numba.carray(pointer(f[10] + head * rates * capacity * 4), (rates, capacity), np.float32)
        weights = numba.carray(pointer(f[11] + head % own_weights * (2 + rates) * 4), 2 + rates, np.float32)
        distance = numba.carray(pointer(f[12]), last - first, np.float32)
        out = numba.carray(pointer(f[13] + head * blocks * 4), blocks, np.float32)
        out[:first] = 0
        out[last:] = 0
        weigh_row(given[first:last], peaks[:, first:last], weights, distance, out[first:last])


@compiled("void(CPointer(int64))", to_address=True)
def _remember_heads(data: Any) -> None:
    """Fields: taken, rows, blocks, known, capacity, rates, chosen; addresses as in `remember`."""
    f = numba.carray(data, _FIELDS)
    blocks, known, capacity, count, chosen = f[2], f[3], f[4], f[5], f[6]
    rates = numba.carray(pointer(f[8]), count, np.float32)
    attended, raised = np.empty(chosen, np.float32), np.empty(chosen, np.float32)
    while True:
        head = take(f.ctypes.data)
        if head >= f[1]:
            break
        all_peaks = numba.carray(pointer(f[7] + head * count * capacity * 4), (count, capacity), np.float32)
        estimate = numba.carray(pointer(f[9] + head * known * 4), known, np.float32)
        selection = numba.carray(pointer(f[10] + head * chosen * 8), chosen, np.int64)
        maxima = numba.carray(pointer(f[11] + head * chosen * 4), chosen, np.float32)
        for i in range(chosen):
            attended[i] = max(_FLOOR, np.log(max(maxima[i], np.float32(1e-30))))
        for t in range(count):
            peaks, rate = all_peaks[t], rates[t]
            for i in range(chosen):
                raised[i] = max(attended[i], peaks[max(0, selection[i])] - rate)
            for i in range(known):
                peaks[i] = max(peaks[i] - rate, estimate[i])
            for i in range(known, blocks):
                peaks[i] -= rate
            for i in range(chosen):
                peaks[max(0, selection[i])] = raised[i]


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
    f = numba.carray(data, _FIELDS)
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
    told = np.zeros(_FIELDS, np.int64)
    told[: len(fields)] = fields
    _run(*threads(numbers >= _PAYS), work.address, told)


def weigh(
    estimate: Tensor, peaks: Tensor, weights: Tensor, distance: Tensor, first: int, last: int, blocks: int
) -> Tensor:
    """Same as `stream.weigh`; `peaks` is in one piece."""
    if peaks.device.type != "cpu":
        return stream.weigh(estimate, peaks, weights, distance, first, last, blocks)
    known, capacity = estimate.shape[2], peaks.shape[3]
    assert 0 <= first <= last <= min(known, capacity, blocks)  # nothing below looks at it again
    assert peaks.is_contiguous() and distance.numel() == last - first
    given, own, far = estimate.contiguous(), weights.contiguous(), distance.contiguous()
    out = torch.empty(*estimate.shape[:2], blocks, dtype=torch.float32, device="cpu")
    _shared_out(
        _weigh_heads, out.numel(), 0, out.shape[0] * out.shape[1], first, last, blocks, known, capacity, peaks.shape[2],
        own.shape[0], *(address(x, torch.float32) for x in (given, peaks, own, far, out)),
    )  # fmt: skip
    return out


def remember(peaks: Tensor, rates: Tensor, blocks: int, estimate: Tensor, selection: Tensor, maxima: Tensor) -> None:
    """Same as `stream.remember`; `peaks` is in one piece."""
    if peaks.device.type != "cpu":
        return stream.remember(peaks, rates, blocks, estimate, selection, maxima)
    known, capacity, chosen = estimate.shape[2], peaks.shape[3], selection.shape[2]
    assert max(blocks, known) <= capacity and peaks.is_contiguous()
    given, ids, found = estimate.contiguous(), selection.contiguous(), maxima.float().contiguous()
    _shared_out(
        _remember_heads, given.numel(), 0, peaks.shape[0] * peaks.shape[1], blocks, known, capacity, peaks.shape[2], chosen,
        *(address(x, torch.float32) for x in (peaks, rates, given)), address(ids, torch.int64), address(found, torch.float32),
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
