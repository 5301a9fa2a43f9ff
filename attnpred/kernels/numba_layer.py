"""A decoder layer of the Llama shape around its attention, by numba: one call before it and one after.

    head    norm, projections to query, key and value, their biases, rotary embedding
    tail    projection of the output, residual, norm, gate and up, SiLU, down, residual

At a decode step a layer of a small model is some forty small operations of torch beside its products; each costs more than
what it computes. Between the steps of a call everything is fp32; what comes in and goes out has the type of the model.
"""

from typing import Any, NamedTuple

import numba
import numpy as np
import torch
from torch import Tensor

from attnpred.kernels.numba_linear import PAYS, Matrices
from attnpred.kernels.numba_linear_tiles import OUT, OUT_KIND, VECTORS, do_tiles, multiply
from attnpred.kernels.numba_tools import address, compiled, narrow, pointer, threads, widen
from attnpred.kernels.numba_vectors import powers

_KINDS = (torch.float32, torch.bfloat16)
_LOG2E = 1.4426950408889634
ROWS, WIDTH, KIND, HIDDEN, NORM, GIVEN, HEADS, KV_HEADS, DIM, COS, SIN, TABLES, QUERY, KEY, VALUE = range(15)
"""Of a call. GIVEN: the attention's output, of `tail`; TABLES: rows of the rotary tables, one for all or one for each."""
INNER, RESULT = HEADS, QUERY
_FIELDS = 15


@numba.njit(fastmath={"reassoc", "contract", "nsz"})
def _norm(x: Any, weight: Any, eps: float, out: Any) -> None:
    """Write to out the rows of x [n, width] over their root mean square, times weight."""
    for row in range(x.shape[0]):
        total = np.float32(0)
        for i in range(x.shape[1]):
            total += x[row, i] * x[row, i]
        scale = np.float32(1) / np.sqrt(total / np.float32(x.shape[1]) + np.float32(eps))
        for i in range(x.shape[1]):
            out[row, i] = x[row, i] * scale * weight[i]


@numba.njit(fastmath={"contract", "nsz"})
def _gate(both: Any, out: Any) -> None:
    """Write to out [n, inner] SiLU of the first half of both [n, 2 * inner], times the second."""
    inner = out.shape[1]
    sixteens = (inner + 15) // 16
    power, top, total = np.zeros(sixteens * 16, np.float32), np.zeros(4, np.float32), np.zeros(4, np.float32)
    for row in range(out.shape[0]):
        gate, up = both[row, :inner], both[row, inner:]
        for i in range(inner):
            power[i] = -abs(gate[i]) * np.float32(_LOG2E)
        powers(power.ctypes.data, sixteens, top.ctypes.data, total.ctypes.data)
        for i in range(inner):
            above = np.float32(1) if gate[i] >= 0 else power[i]
            out[row, i] = gate[i] * up[i] * (above / (np.float32(1) + power[i]))
    power[0] = top[0] = total[0] = 0


@numba.njit
def _store(values: Any, kind: int, at: int) -> None:
    """Write values [n] to the address in fp32 (0) or bf16 (1)."""
    if kind:
        narrow(values, at)
    else:
        out = numba.carray(pointer(at), values.size, np.float32)
        out[:] = values


@numba.njit
def _turned(x: Any, cos: Any, sin: Any, out: Any) -> None:
    """Write to out [D] the vector x [D] in its place of the text."""
    half = x.size // 2
    for i in range(half):
        out[i] = x[i] * cos[i] - x[half + i] * sin[i]
        out[half + i] = x[half + i] * cos[half + i] + x[i] * sin[half + i]


@compiled("void(int64, int64, int64, int64[::1], int64[::1], float64)")
def _head(parallel: int, count: int, work: int, f: Any, together: Any, eps: float) -> None:
    rows, width, kind, dim = f[ROWS], f[WIDTH], f[KIND], f[DIM]
    hidden, x = np.empty((rows, width), np.float32), np.empty((rows, width), np.float32)
    weight = np.empty(width, np.float32)
    widen(f[HIDDEN], kind, 0, hidden)
    widen(f[NORM], kind, 0, weight)
    _norm(hidden, weight, eps, x)
    heads, kv_heads = f[HEADS], f[KV_HEADS]
    found = np.empty((rows, heads + 2 * kv_heads, dim), np.float32)
    together[OUT], together[OUT_KIND], together[VECTORS] = found.ctypes.data, 0, rows
    multiply(parallel, count, work, together, x)
    cos, sin = np.empty((f[TABLES], dim), np.float32), np.empty((f[TABLES], dim), np.float32)
    widen(f[COS], kind, 0, cos)
    widen(f[SIN], kind, 0, sin)
    turned, size = np.empty(dim, np.float32), dim * (4 - 2 * kind)
    for row in range(rows):
        place = min(row, f[TABLES] - 1)
        for head in range(heads + kv_heads):
            _turned(found[row, head], cos[place], sin[place], turned)
            is_query = head < heads
            at = row * heads + head if is_query else row * kv_heads + head - heads
            _store(turned, kind, (f[QUERY] if is_query else f[KEY]) + at * size)
        for head in range(kv_heads):
            _store(found[row, heads + kv_heads + head], kind, f[VALUE] + (row * kv_heads + head) * size)


@compiled("void(int64, int64, int64, int64[::1], int64[::1], int64[::1], int64[::1], float64)")
def _tail(parallel: int, count: int, work: int, f: Any, output: Any, gate_up: Any, down: Any, eps: float) -> None:
    rows, width, kind, inner = f[ROWS], f[WIDTH], f[KIND], f[INNER]
    hidden, x, weight = (
        np.empty((rows, width), np.float32),
        np.empty((rows, width), np.float32),
        np.empty(width, np.float32),
    )
    widen(f[HIDDEN], kind, 0, hidden)
    widen(f[NORM], kind, 0, weight)
    given = np.empty((rows, f[DIM]), np.float32)
    widen(f[GIVEN], kind, 0, given)
    output[OUT], output[OUT_KIND], output[VECTORS] = x.ctypes.data, 0, rows
    multiply(parallel, count, work, output, given)
    hidden += x
    _norm(hidden, weight, eps, x)
    both, product = np.empty((rows, 2 * inner), np.float32), np.empty((rows, inner), np.float32)
    gate_up[OUT], gate_up[OUT_KIND], gate_up[VECTORS] = both.ctypes.data, 0, rows
    multiply(parallel, count, work, gate_up, x)
    _gate(both, product)
    down[OUT], down[OUT_KIND], down[VECTORS] = x.ctypes.data, 0, rows
    multiply(parallel, count, work, down, product)
    hidden += x
    for row in range(rows):
        _store(hidden[row], kind, f[RESULT] + row * width * (4 - 2 * kind))


class Norm(NamedTuple):
    """weight [width], of the model's type."""

    weight: Tensor
    eps: float


class Layer:
    """The matrices of a layer; dim: numbers of a head."""

    def __init__(
        self, before: Norm, inputs: Matrices, output: Matrices, after: Norm, gate_up: Matrices, down: Matrices, dim: int
    ) -> None:
        self.before, self.inputs, self.output, self.after = before, inputs, output, after
        self.gate_up, self.down = gate_up, down
        self.dtype, self.dim = inputs.dtype, dim
        self.heads, self.kv_heads = inputs.rows[0] // dim, inputs.rows[1] // dim
        self.pays = inputs.bytes >= PAYS

    def head(self, hidden: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return query [B, Hq, 1, D], key and value [B, Hkv, 1, D] of hidden [B, 1, width]; cos and sin [B or 1, 1, D]."""
        batch, dtype = hidden.shape[0], self.dtype
        query = torch.empty(batch, self.heads, 1, self.dim, dtype=dtype, device="cpu")
        key, value = (torch.empty(batch, self.kv_heads, 1, self.dim, dtype=dtype, device="cpu") for _ in range(2))
        fields = np.array(
            (
                batch, self.inputs.width, int(dtype == torch.bfloat16), address(hidden, dtype), address(self.before.weight, dtype),
                0, self.heads, self.kv_heads, self.dim, address(cos, dtype), address(sin, dtype), cos.shape[0],
                address(query, dtype), address(key, dtype), address(value, dtype),
            ),
            np.int64,
        )  # fmt: skip
        _head(*threads(self.pays), do_tiles.address, fields, self.inputs.fields.copy(), self.before.eps)
        return query, key, value

    def tail(self, hidden: Tensor, attended: Tensor) -> Tensor:
        """Return the layer's output [B, 1, width] of its input and of the attention's output [B, 1, Hq * D]."""
        dtype, result = self.dtype, torch.empty_like(hidden)
        fields = np.array(
            (
                hidden.shape[0], self.inputs.width, int(dtype == torch.bfloat16), address(hidden, dtype),
                address(self.after.weight, dtype), address(attended, dtype), self.down.width, 0, self.output.width, 0, 0, 0,
                address(result, dtype), 0, 0,
            ),
            np.int64,
        )  # fmt: skip
        matrices = (self.output.fields.copy(), self.gate_up.fields.copy(), self.down.fields.copy())
        _tail(*threads(self.pays), do_tiles.address, fields, *matrices, self.after.eps)
        return result
