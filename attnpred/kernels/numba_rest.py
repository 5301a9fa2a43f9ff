"""`add_rest` by numba (extra `fast`): one call, where torch takes some ten small ones."""

from typing import Any

import numba
import numpy as np
import torch
from torch import Tensor

from attnpred.kernels.numba_tools import address, compiled, pointer
from attnpred.kernels.rest import RestTerms, add_rest

(
    HEADS, GROUP, DIM, WIDTH, OUTPUT, QUERY, NORMALISER, LEVEL, SLOPE, MEAN_KEY, VECTOR, WEIGHT, RESULT, SHARE,
) = range(14)  # fmt: skip
"""Query heads of all rows, how many share a kv head, D, Dv, and addresses, all of fp32."""
FIELDS = 14


@numba.njit(fastmath={"reassoc", "contract"})
def _product(a: Any, b: Any) -> Any:
    """Return the product of two vectors [n]."""
    total = np.float32(0)
    for i in range(a.size):
        total += a[i] * b[i]
    return total


@numba.njit
def add_heads(f: Any) -> None:
    """Do what `add_rest` does, head by head; OUTPUT and RESULT may be the same."""
    heads, dim, width = f[HEADS], f[DIM], f[WIDTH]
    normaliser, level = (
        numba.carray(pointer(f[NORMALISER]), heads, np.float32),
        numba.carray(pointer(f[LEVEL]), heads, np.float32),
    )
    slope, weight = (
        numba.carray(pointer(f[SLOPE]), heads, np.float32),
        numba.carray(pointer(f[WEIGHT]), heads, np.float32),
    )
    share = numba.carray(pointer(f[SHARE]), heads, np.float32)
    for head in range(heads):
        query = numba.carray(pointer(f[QUERY] + head * dim * 4), dim, np.float32)
        key = numba.carray(pointer(f[MEAN_KEY] + head // f[GROUP] * dim * 4), dim, np.float32)
        more = level[head] + slope[head] * _product(query, key) - normaliser[head]
        part = np.float32(1) / (np.float32(1) + np.exp(-more))
        share[head] = part
        own = numba.carray(pointer(f[OUTPUT] + head * width * 4), width, np.float32)
        vector = numba.carray(pointer(f[VECTOR] + head * width * 4), width, np.float32)
        out = numba.carray(pointer(f[RESULT] + head * width * 4), width, np.float32)
        kept = np.float32(1) - part * weight[head]
        for i in range(width):
            out[i] = own[i] * kept + part * vector[i]


@compiled("void(int64[::1])")
def _add(f: Any) -> None:
    add_heads(f)


def fields_of(heads: int, dim: int, terms: RestTerms) -> Any:
    """Return what `add_heads` is told of `terms` for so many query heads of all rows; the other addresses are 0."""
    batch, kv_heads, _ = terms.mean_key.shape
    assert all(x.is_contiguous() for x in terms) and terms.mean_key.shape[2] == dim
    assert heads == terms.level.numel() == terms.slope.numel() == terms.weight.numel() == terms.vector[..., 0].numel()
    told = (address(x, torch.float32) for x in terms)
    group, width = heads // (batch * kv_heads), terms.vector.shape[2]
    return np.array((heads, group, dim, width, 0, 0, 0, *told, 0, 0), np.int64)


def serves(output: Tensor, query: Tensor) -> bool:
    """True where the kernel can take these tensors."""
    return output.device.type == "cpu" and output.dtype == query.dtype == torch.float32


def add_rest_numba(output: Tensor, query: Tensor, normaliser: Tensor, terms: RestTerms) -> tuple[Tensor, Tensor]:
    """Same as `rest.add_rest`; what `serves` does not is done by that."""
    if not serves(output, query):
        return add_rest(output, query, normaliser, terms)
    batch, heads, dim = query.shape
    given = (output.contiguous(), query.contiguous(), normaliser.contiguous())
    found, share = torch.empty_like(given[0]), torch.empty_like(given[2])
    assert terms.vector.shape == output.shape and share.shape == (batch, heads)
    fields = fields_of(batch * heads, dim, terms)
    fields[OUTPUT : NORMALISER + 1] = [address(x, torch.float32) for x in given]
    fields[RESULT:] = address(found, torch.float32), address(share, torch.float32)
    _add(fields)
    return found, share
