"""`write_token`: one token's keys and values to their places, in one call that nothing has to be looked up for.

torch takes two views and two strided copies for it, which at a decode step cost more than the memory that is written.
"""

import numba
import numpy as np
from torch import Tensor

from attnpred.kernels.numba_tools import address, compiled, pointer


@numba.njit
def _copy(source: int, source_step: int, target: int, target_step: int, rows: int, size: int) -> None:
    for row in range(rows):
        read = numba.carray(pointer(source + row * source_step), size, np.uint8)
        written = numba.carray(pointer(target + row * target_step), size, np.uint8)
        written[:] = read


@compiled("void(int64, int64, int64, int64, int64, int64, int64, int64, int64, int64, int64)")
def _copy_both(
    rows: int, keys: int, key_step: int, to_keys: int, to_key_step: int, key_size: int,
    values: int, value_step: int, to_values: int, to_value_step: int, value_size: int,
) -> None:  # fmt: skip
    _copy(keys, key_step, to_keys, to_key_step, rows, key_size)
    _copy(values, value_step, to_values, to_value_step, rows, value_size)


def write_token(keys: Tensor, values: Tensor, to_keys: Tensor, to_values: Tensor, place: int) -> None:
    """Write keys, values [B, H, 1, D] as token `place` of to_keys, to_values [B, H, capacity, D] (contiguous, same dtypes).

    Numbers of a token and heads of a row have to lie as in a tensor in one piece: strides of D, and one.
    """
    width, value_width = to_keys.element_size(), to_values.element_size()
    key_size, value_size = keys.shape[3] * width, values.shape[3] * value_width
    _copy_both(
        keys.shape[0] * keys.shape[1],
        address(keys, to_keys.dtype), key_size, address(to_keys, to_keys.dtype) + place * key_size, to_keys.shape[2] * key_size, key_size,
        address(values, to_values.dtype), value_size, address(to_values, to_values.dtype) + place * value_size, to_values.shape[2] * value_size,
        value_size,
    )  # fmt: skip
