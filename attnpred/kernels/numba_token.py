"""All decoder layers of one token in one compiled call: no Python and no torch between embedding and last norm.

For models whose layers all have the Llama shape (`attnpred.kernels.numba_layer`) and attend by the compiled step
(`attnpred.kernels.numba_step`). All of it is one region of threads (`attnpred.kernels.numba_team`).
"""

from collections.abc import Sequence
from typing import Any

import numba
import numpy as np
import torch
from torch import Tensor

from attnpred.kernels import numba_layer as shape
from attnpred.kernels import numba_step as step
from attnpred.kernels.numba_digest import WORKS
from attnpred.kernels.numba_items import do_items
from attnpred.kernels.numba_linear_tiles import do_tiles
from attnpred.kernels.numba_stream import remember_heads
from attnpred.kernels.numba_team import DONE, TEAM, YIELD, help_out, leads, new_team, share_out, show
from attnpred.kernels.numba_tools import address, compiled, pointer, threads

(_TEAM, _THREADS, _TABLE, _LAYERS, _ROWS, _LENGTH, _HIDDEN, _COS, _SIN, _PLACES, _WORKS) = range(11)
_FIELDS = 11
_ADDRESSES = np.array([work.address for work in (do_tiles, *WORKS, do_items, remember_heads)], np.int64)


@numba.njit
def _layers(parallel: int, count: int, f: Any) -> None:
    rows, length = f[_ROWS], f[_LENGTH]
    table = numba.carray(pointer(f[_TABLE]), (f[_LAYERS], 2), np.int64)
    works = numba.carray(pointer(f[_WORKS]), 6, np.int64)
    for number in range(f[_LAYERS]):
        own = numba.carray(pointer(table[number, 0]), shape.FIELDS, np.int64)
        plan = numba.carray(pointer(table[number, 1]), step.FIELDS, np.int64)
        heads, kv_heads, dim = own[shape.HEADS], own[shape.KV_HEADS], own[shape.DIM]
        hidden = numba.carray(pointer(f[_HIDDEN]), (rows, own[shape.WIDTH]), np.float32)
        cos = numba.carray(pointer(f[_COS]), (f[_PLACES], dim), np.float32)
        sin = numba.carray(pointer(f[_SIN]), (f[_PLACES], dim), np.float32)
        found, given = np.empty((rows, heads + 2 * kv_heads, dim), np.float32), np.empty((rows, heads, dim), np.float32)
        shape.project(parallel, count, works[0], own, hidden, cos, sin, found)
        step.append(plan, found, length)
        step.attend(parallel, count, works, plan, found, length + 1, given)
        shape.finish(parallel, count, works[0], own, given.reshape(rows, heads * dim), hidden)


@compiled("void(CPointer(int64))", to_address=True)
def _do_token(data: Any) -> None:
    """The first thread that comes leads, the others help."""
    f = numba.carray(data, _FIELDS)
    team = f[_TEAM]
    if f[_THREADS] < 2:
        _layers(0, 1, f)
    elif leads(team):
        _layers(TEAM, team, f)
        show(team + 8 * DONE, 1)
    else:
        help_out(team)


@compiled("void(int64, int64, int64, int64[::1])")
def _run(parallel: int, count: int, work: int, f: Any) -> None:
    share_out(parallel, count, work, f.ctypes.data)


class Token:
    """Layers and their plans, in order: addresses of `Layer.fields` and of the fields of `numba_step`."""

    def __init__(self, layers: Sequence[int], plans: Sequence[int]) -> None:
        self._table = np.array([layers, plans], np.int64).T.copy()
        self._team = new_team()

    def run(self, hidden: Tensor, cos: Tensor, sin: Tensor, length: int) -> None:
        """Bring hidden [B, width] through all layers, in place, behind `length` tokens; cos, sin [1 or B, D]; all fp32."""
        self._team[:YIELD] = 0
        parallel, count = threads()
        count = count if parallel else 1
        told = np.array(
            (
                self._team.ctypes.data, count, self._table.ctypes.data, len(self._table), hidden.shape[0], length,
                *(address(x, torch.float32) for x in (hidden, cos, sin)), cos.shape[0], _ADDRESSES.ctypes.data,
            ),
            np.int64,
        )  # fmt: skip
        _run(parallel, count, _do_token.address, told)
