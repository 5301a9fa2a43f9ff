"""What the numba kernels share: compilation, and OpenMP's threads.

numba's own way to OpenMP brings a second copy of that library, whose threads then wait in busy loops on the cores that
torch's threads want. So `fork` calls the copy that torch has loaded, where there is one (`GOMP_parallel`, on Linux);
elsewhere one thread does all of the work.
"""

import ctypes
from collections.abc import Callable
from typing import Any

import numba
import numpy as np
import torch
from llvmlite import ir
from numba import types
from numba.extending import intrinsic
from torch import Tensor

from attnpred.errors import ShapeError
from attnpred.kernels.numba_cache import compile_cached

Function = Callable[..., Any]


def compiled(signature: str, *, to_address: bool = False, nogil: bool = False) -> Callable[[Function], Any]:
    """Compile a function for its one signature, once per machine; `to_address`: for `fork`; `nogil`: for threads."""

    def apply(function: Function) -> Any:
        def compile_with(cache: bool) -> Any:
            if to_address:
                return numba.cfunc(signature, cache=cache)(function)
            return numba.njit(signature, cache=cache, nogil=nogil)(function)

        return compile_cached(compile_with)

    return apply


def address(tensor: Tensor, *kinds: torch.dtype) -> int:
    """Return where `tensor` lies, for compiled code, which looks at nothing again. Raises `ShapeError`.

    It has to be in host memory, and its numbers of one of `kinds`.
    """
    if not tensor.is_cpu or tensor.dtype not in kinds:
        names = " or ".join(str(kind).removeprefix("torch.") for kind in kinds)
        raise ShapeError(
            f"got {str(tensor.dtype).removeprefix('torch.')} on {tensor.device}, expected {names} on the CPU: give tensors of one model"
        )
    return tensor.data_ptr()


def threads(pays: bool = True) -> tuple[int, int]:
    """Return what `share_out` needs to know: the address of GOMP_parallel, 0 for none, and how many threads to use.

    That is as many as torch has, or one where more would not pay: to wake and to wait for others takes several
    microseconds, and far longer on a busy machine, where one that waits may hold the core that the other needs.
    """
    return _PARALLEL, torch.get_num_threads() if pays else 1


try:
    _PARALLEL = ctypes.cast(ctypes.CDLL(None).GOMP_parallel, ctypes.c_void_p).value or 0
except (AttributeError, OSError, TypeError):  # no such function, or no such thing as all loaded libraries (Windows)
    _PARALLEL = 0


@intrinsic
def pointer(typing: Any, address: Any) -> Any:
    """Return the address, an integer, as `numba.carray` wants it."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], context.get_value_type(types.voidptr))

    return types.voidptr(types.int64), generate


@intrinsic
def take(typing: Any, counter: Any) -> Any:
    """Return the integer at the address `counter` and count on, so that every thread gets another one."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        at = builder.inttoptr(arguments[0], ir.IntType(64).as_pointer())
        return builder.atomic_rmw("add", at, ir.Constant(ir.IntType(64), 1), "monotonic")

    return types.int64(types.int64), generate


@intrinsic
def fork(typing: Any, parallel: Any, count: Any, work: Any, data: Any) -> Any:
    """Call the function at `work` with the address `data` on `count` threads; all arguments are integers."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        parallel, count, work, data = arguments
        byte, number = ir.IntType(8).as_pointer(), ir.IntType(32)
        kind = ir.FunctionType(ir.VoidType(), [byte]).as_pointer()
        work, data = builder.inttoptr(work, kind), builder.inttoptr(data, byte)
        alone = builder.or_(
            builder.icmp_signed("==", parallel, parallel.type(0)), builder.icmp_signed("<=", count, count.type(1))
        )
        with builder.if_else(alone) as (one, many):
            with one:
                builder.call(work, [data])
            with many:
                fork = ir.FunctionType(ir.VoidType(), [kind, byte, number, number]).as_pointer()
                builder.call(builder.inttoptr(parallel, fork), [work, data, builder.trunc(count, number), number(0)])
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64, types.int64), generate


@numba.njit
def widen(address: int, kind: int, first: int, out: Any) -> None:
    """Write to out the numbers at `address` from the `first` on: fp32 (0) or bf16 (1)."""
    if kind == 0:
        out.reshape(-1)[:] = numba.carray(pointer(address + 4 * first), out.size, np.float32)
        return
    stored = numba.carray(pointer(address + 2 * first), out.size, np.uint16)
    bits = out.reshape(-1).view(np.int32)
    for i in range(bits.size):
        bits[i] = np.int32(stored[i]) << np.int32(16)


@numba.njit
def narrow(values: Any, address: int) -> None:
    """Write fp32 values [n] to `address` as bf16, each the nearest, of two the even one."""
    bits, stored = values.view(np.int32), numba.carray(pointer(address), values.size, np.uint16)
    for i in range(values.size):
        number = bits[i] + np.int32(0x7FFF) + ((bits[i] >> np.int32(16)) & np.int32(1))
        stored[i] = (
            np.uint16((number >> np.int32(16)) & np.int32(0xFFFF)) if values[i] == values[i] else np.uint16(0x7FC0)
        )
