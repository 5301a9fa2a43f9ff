"""`weigh` and `remember` of `attnpred.kernels.stream`, one pass each, by numba."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from attnpred.kernels import stream
from attnpred.kernels.digest import FLOOR
from attnpred.kernels.numba_tools import compiled

_FLOOR = np.float32(FLOOR)


@compiled("void(float32[:, ::1], float32[:, :, ::1], float32[:, :], float32[::1], int64, float32[:, ::1])")
def _weigh(estimate: Any, peaks: Any, weights: Any, distance: Any, first: int, out: Any) -> None:
    last = first + out.shape[1]
    for head in range(out.shape[0]):
        own, row, given = weights[head % weights.shape[0]], out[head], estimate[head, first:last]
        a, z = own[0], own[own.size - 1]
        for i in range(row.size):
            row[i] = a * given[i] + z * distance[i]
        for t in range(peaks.shape[1]):
            b, past = own[1 + t], peaks[head, t, first:last]
            for i in range(row.size):
                row[i] += b * past[i]


@compiled("void(float32[:, :, ::1], float32[::1], int64, float32[:, ::1], int64[:, ::1], float32[:, ::1])")
def _remember(peaks: Any, rates: Any, blocks: int, estimate: Any, selection: Any, maxima: Any) -> None:
    known = estimate.shape[1]
    for head in range(peaks.shape[0]):
        attended = np.empty(selection.shape[1], np.float32)
        for i in range(attended.size):
            attended[i] = max(_FLOOR, np.log(max(maxima[head, i], np.float32(1e-30))))
        for t in range(rates.size):
            rate = rates[t]
            raised = np.empty(attended.size, np.float32)
            for i in range(attended.size):
                raised[i] = max(attended[i], peaks[head, t, max(0, selection[head, i])] - rate)
            for i in range(known):
                peaks[head, t, i] = max(peaks[head, t, i] - rate, estimate[head, i])
            for i in range(known, blocks):
                peaks[head, t, i] -= rate
            for i in range(attended.size):
                peaks[head, t, max(0, selection[head, i])] = raised[i]


def _flat(tensor: Tensor) -> Any:
    """Return `tensor` [B, Hs, ...] as an array [B * Hs, ...] in one piece."""
    return tensor.flatten(0, 1).contiguous().numpy()


def weigh(estimate: Tensor, peaks: Tensor, weights: Tensor, distance: Tensor, first: int, last: int) -> Tensor:
    """Same as `stream.weigh`."""
    if peaks.device.type != "cpu":
        return stream.weigh(estimate, peaks, weights, distance, first, last)
    assert 0 <= first <= last <= min(estimate.shape[2], peaks.shape[3])  # nothing below looks at it again
    out = torch.empty(*estimate.shape[:2], last - first)
    _weigh(_flat(estimate), _flat(peaks), weights.numpy(), distance.numpy(), first, out.flatten(0, 1).numpy())
    return out


def remember(peaks: Tensor, rates: Tensor, blocks: int, estimate: Tensor, selection: Tensor, maxima: Tensor) -> None:
    """Same as `stream.remember`; `peaks` is in one piece."""
    if peaks.device.type != "cpu":
        return stream.remember(peaks, rates, blocks, estimate, selection, maxima)
    assert max(blocks, estimate.shape[2]) <= peaks.shape[3] and peaks.is_contiguous()
    table = peaks.flatten(0, 1).numpy()
    _remember(table, rates.numpy(), blocks, _flat(estimate), _flat(selection), _flat(maxima.float()))


@compiled("void(float32[:, :, :], int64[:, :, ::1])")
def _best(scores: Any, out: Any) -> None:
    """Bisect for the threshold, because counting what is above one is a few instructions for 16 numbers."""
    count = out.shape[2]
    values = np.empty(scores.shape[2], np.float32)
    keys = values.view(np.int32)
    for batch in range(out.shape[0]):
        for head in range(out.shape[1]):
            row, places = scores[batch, head], out[batch, head]
            for i in range(row.size):
                values[i] = row[i]
            for i in range(row.size):  # integers in the order of the numbers
                keys[i] ^= (keys[i] >> np.int32(31)) & np.int32(0x7FFFFFFF)
            low, high = -(2**31), 2**31  # at least `count` are not below low, fewer are not below high
            while high - low > 1:
                middle, found = (low + high) // 2, np.int32(0)
                for i in range(row.size):
                    found = np.int32(found + (keys[i] >= np.int32(middle)))
                if found < count:
                    high = middle
                else:
                    low = middle
                    if found == count:
                        break
            kept = 0
            for i in range(row.size):
                if keys[i] > low:
                    places[kept] = i
                    kept += 1
            for i in range(row.size):
                if kept == count:
                    break
                if keys[i] == low:
                    places[kept] = i
                    kept += 1


def best(scores: Tensor, count: int) -> Tensor:
    """Same as `stream.best`."""
    if scores.device.type != "cpu" or scores.dtype != torch.float32:
        return stream.best(scores, count)
    out = torch.empty(*scores.shape[:2], count, dtype=torch.int64)
    if count:
        _best(scores.detach().numpy(), out.numpy())
    return out
