"""A decoder layer of the Llama shape around its attention, by numba.

    project   norm, projections to query, key and value, their biases, norms of queries and keys, rotary embedding
    finish    projection of the attention's output, residual, norm, gate and up, activation, down, residual

Models that have norms behind attention and MLP too (Gemma3), or of each head's query and key (Qwen3), say so; others have
none. At a decode step a layer of a small model is some forty small operations of torch beside its products; each costs more
than what it computes. Everything here is fp32; what comes in and goes out of `Layer.head` and `Layer.tail`, a call each with
attention between them, has the type of the model. Both are also parts of a whole token (`attnpred.kernels.numba_token`).
"""

from dataclasses import dataclass
from typing import Any

import numba
import numpy as np
import torch
from torch import Tensor

from attnpred.kernels import numba_linear_tiles as tiles
from attnpred.kernels.numba_linear import PAYS, Matrices
from attnpred.kernels.numba_linear_tiles import do_tiles, multiply
from attnpred.kernels.numba_tools import address, compiled, narrow, pointer, threads, widen
from attnpred.kernels.numba_vectors import powers

ACTIVATIONS = {"silu": 0, "gelu_tanh": 1}
_LOG2E = 1.4426950408889634
(
    WIDTH, HEADS, KV_HEADS, DIM, INNER, ACTIVATION, INPUTS, OUTPUT, GATE_UP, DOWN,
    BEFORE, OF_QUERY, OF_KEY, BEHIND_ATTENTION, AFTER, BEHIND_MLP,
) = range(16)  # fmt: skip
"""Of a layer. Addresses of the fields of its matrices (`Matrices`), and of its norms (`Norm.numbers`), 0 for none."""
FIELDS = 16
ROWS, KIND, HIDDEN, GIVEN, COS, SIN, TABLES, QUERY, KEY, VALUE, RESULT = range(11)
"""Of a call. GIVEN: the attention's output, of `tail`; TABLES: rows of the rotary tables, one for all or one for each."""
_CALL = 11


@numba.njit(fastmath={"reassoc", "contract", "nsz"})
def _norm(x: Any, at: int, out: Any) -> None:
    """Write to out the rows of x [n, width] over their root mean square, times the weight at `at`, whose end is epsilon."""
    width = x.shape[1]
    weight = numba.carray(pointer(at), width + 1, np.float32)
    for row in range(x.shape[0]):
        total = np.float32(0)
        for i in range(width):
            total += x[row, i] * x[row, i]
        scale = np.float32(1) / np.sqrt(total / np.float32(width) + weight[width])
        for i in range(width):
            out[row, i] = x[row, i] * scale * weight[i]


@numba.njit(fastmath={"contract", "nsz"})
def _gate(both: Any, activation: int, out: Any) -> None:
    """Write to out [n, inner] the activation of the first half of both [n, 2 * inner], times the second."""
    # Both activations are x times the logistic function: of x (SiLU), or of an odd polynomial of it (GELU by tanh).
    inner = out.shape[1]
    sixteens = (inner + 15) // 16
    power, top, total = np.zeros(sixteens * 16, np.float32), np.zeros(4, np.float32), np.zeros(4, np.float32)
    for row in range(out.shape[0]):
        gate, up = both[row, :inner], both[row, inner:]
        for i in range(inner):
            x = gate[i]
            if activation:
                x = np.float32(1.5957691216057308) * (x + np.float32(0.044715) * x * x * x)
            power[i] = -abs(x) * np.float32(_LOG2E)
        powers(power.ctypes.data, sixteens, top.ctypes.data, total.ctypes.data)
        for i in range(inner):
            above = np.float32(1) if gate[i] >= 0 else power[i]
            out[row, i] = gate[i] * up[i] * (above / (np.float32(1) + power[i]))
    power[0] = top[0] = total[0] = 0


@numba.njit
def store(values: Any, kind: int, at: int) -> None:
    """Write values [n] to the address in fp32 (0) or bf16 (1)."""
    if kind:
        narrow(values, at)
    else:
        out = numba.carray(pointer(at), values.size, np.float32)
        out[:] = values


@numba.njit
def _turn(x: Any, cos: Any, sin: Any) -> None:
    """Bring the vector x [D] to its place of the text."""
    half = x.size // 2
    for i in range(half):
        first, second = x[i], x[half + i]
        x[i] = first * cos[i] - second * sin[i]
        x[half + i] = second * cos[half + i] + first * sin[half + i]


@numba.njit
def _product(parallel: int, count: int, work: int, at: int, x: Any, out: Any) -> None:
    """Write to out [n, rows] x [n, width] times the matrices whose fields lie at `at`."""
    f = numba.carray(pointer(at), tiles.FIELDS, np.int64)
    f[tiles.OUT], f[tiles.OUT_KIND], f[tiles.VECTORS] = out.ctypes.data, 0, x.shape[0]
    multiply(parallel, count, work, f, x)


@numba.njit
def project(parallel: int, count: int, work: int, f: Any, hidden: Any, cos: Any, sin: Any, found: Any) -> None:
    """Write to found [n, Hq + 2 Hkv, D] query, key and value of hidden [n, width]; cos and sin [1 or n, D]."""
    x = np.empty_like(hidden)
    _norm(hidden, f[BEFORE], x)
    _product(parallel, count, work, f[INPUTS], x, found)
    heads, last = f[HEADS], f[HEADS] + f[KV_HEADS]
    for row in range(hidden.shape[0]):
        place = min(row, cos.shape[0] - 1)
        if f[OF_QUERY]:
            _norm(found[row, :heads], f[OF_QUERY], found[row, :heads])
            _norm(found[row, heads:last], f[OF_KEY], found[row, heads:last])
        for head in range(last):
            _turn(found[row, head], cos[place], sin[place])


@numba.njit
def finish(parallel: int, count: int, work: int, f: Any, given: Any, hidden: Any) -> None:
    """Bring hidden [n, width] from a layer's input to its output; given [n, Hq * D] is what attention found."""
    rows, inner = hidden.shape[0], f[INNER]
    x, both, product = (
        np.empty_like(hidden),
        np.empty((rows, 2 * inner), np.float32),
        np.empty((rows, inner), np.float32),
    )
    _product(parallel, count, work, f[OUTPUT], given, x)
    if f[BEHIND_ATTENTION]:
        _norm(x, f[BEHIND_ATTENTION], x)
    hidden += x
    _norm(hidden, f[AFTER], x)
    _product(parallel, count, work, f[GATE_UP], x, both)
    _gate(both, f[ACTIVATION], product)
    _product(parallel, count, work, f[DOWN], product, x)
    if f[BEHIND_MLP]:
        _norm(x, f[BEHIND_MLP], x)
    hidden += x


@compiled("void(int64, int64, int64, int64[::1], int64[::1])")
def _head(parallel: int, count: int, work: int, f: Any, c: Any) -> None:
    rows, kind, dim, heads, kv_heads = c[ROWS], c[KIND], f[DIM], f[HEADS], f[KV_HEADS]
    hidden, found = np.empty((rows, f[WIDTH]), np.float32), np.empty((rows, heads + 2 * kv_heads, dim), np.float32)
    cos, sin = np.empty((c[TABLES], dim), np.float32), np.empty((c[TABLES], dim), np.float32)
    widen(c[HIDDEN], kind, 0, hidden)
    widen(c[COS], kind, 0, cos)
    widen(c[SIN], kind, 0, sin)
    project(parallel, count, work, f, hidden, cos, sin, found)
    last, each = heads + kv_heads, kv_heads * dim * (4 - 2 * kind)
    for row in range(rows):
        store(found[row, :heads].reshape(-1), kind, c[QUERY] + row * heads * dim * (4 - 2 * kind))
        store(found[row, heads:last].reshape(-1), kind, c[KEY] + row * each)
        store(found[row, last:].reshape(-1), kind, c[VALUE] + row * each)


@compiled("void(int64, int64, int64, int64[::1], int64[::1])")
def _tail(parallel: int, count: int, work: int, f: Any, c: Any) -> None:
    rows, kind = c[ROWS], c[KIND]
    hidden, given = np.empty((rows, f[WIDTH]), np.float32), np.empty((rows, f[HEADS] * f[DIM]), np.float32)
    widen(c[HIDDEN], kind, 0, hidden)
    widen(c[GIVEN], kind, 0, given)
    finish(parallel, count, work, f, given, hidden)
    store(hidden.reshape(-1), kind, c[RESULT])


class Norm:
    """weight [width]; offset: what is added to it (Gemma's weights are short of one)."""

    def __init__(self, weight: Tensor, eps: float, offset: float = 0.0) -> None:
        self.dtype = weight.dtype
        own = weight.detach().float() + offset
        self.numbers = torch.cat((own, own.new_tensor([eps])))

    def at(self) -> int:
        return address(self.numbers, torch.float32)


@dataclass(frozen=True, slots=True)
class Norms:
    """Of a layer: before attention and before the MLP, and of those that not all models have."""

    before: Norm
    after: Norm
    of_query: Norm | None = None
    of_key: Norm | None = None
    behind_attention: Norm | None = None
    behind_mlp: Norm | None = None


class Layer:
    """Norms and matrices of a layer; dim: numbers of a head; activation: one of `ACTIVATIONS`."""

    def __init__(
        self,
        norms: Norms,
        inputs: Matrices,
        output: Matrices,
        gate_up: Matrices,
        down: Matrices,
        dim: int,
        activation: str,
    ) -> None:
        self.dtype, self.dim, self.width = inputs.dtype, dim, inputs.width
        self.heads, self.kv_heads = inputs.rows[0] // dim, inputs.rows[1] // dim
        self.pays = inputs.bytes >= PAYS
        matrices = [each.fields.copy() for each in (inputs, output, gate_up, down)]
        own = (norms.before, norms.of_query, norms.of_key, norms.behind_attention, norms.after, norms.behind_mlp)
        self._held = norms, inputs, output, gate_up, down, matrices
        self.fields = np.array(
            (
                inputs.width, self.heads, self.kv_heads, dim, down.width, ACTIVATIONS[activation],
                *(each.ctypes.data for each in matrices), *(0 if norm is None else norm.at() for norm in own),
            ),
            np.int64,
        )  # fmt: skip

    def head(self, hidden: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return query [B, Hq, 1, D], key and value [B, Hkv, 1, D] of hidden [B, 1, width]; cos and sin [B or 1, 1, D]."""
        batch, dtype = hidden.shape[0], self.dtype
        query = torch.empty(batch, self.heads, 1, self.dim, dtype=dtype, device="cpu")
        key, value = (torch.empty(batch, self.kv_heads, 1, self.dim, dtype=dtype, device="cpu") for _ in range(2))
        told = np.array(
            (
                batch, int(dtype == torch.bfloat16), address(hidden, dtype), 0, address(cos, dtype), address(sin, dtype),
                cos.shape[0], address(query, dtype), address(key, dtype), address(value, dtype), 0,
            ),
            np.int64,
        )  # fmt: skip
        _head(*threads(self.pays), do_tiles.address, self.fields, told)
        return query, key, value

    def tail(self, hidden: Tensor, attended: Tensor) -> Tensor:
        """Return the layer's output [B, 1, width] of its input and of the attention's output [B, 1, Hq * D]."""
        dtype, result, told = self.dtype, torch.empty_like(hidden), np.zeros(_CALL, np.int64)
        told[[ROWS, KIND, HIDDEN]] = hidden.shape[0], int(dtype == torch.bfloat16), address(hidden, dtype)
        told[[GIVEN, RESULT]] = address(attended, dtype), address(result, dtype)
        _tail(*threads(self.pays), do_tiles.address, self.fields, told)
        return result
