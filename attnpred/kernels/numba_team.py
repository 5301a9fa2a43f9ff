"""One parallel region for a whole token: a leader, who does everything in order, and helpers, who share his loops.

A token is some hundred loops, each of some microseconds, with a little to do in between that only one thread can. To open
and close a parallel region for each costs as much as what it does; and where other programs run on the cores, each end of a
region waits for a thread that does not run. So there is one region (`fork`): the thread that comes first leads. What it
shares out (`share_out` with `TEAM`) is open to whoever comes while there is something left: it never waits for a helper
that has not come, only for one that has taken an item and is not done with it.

Who waits spins some microseconds, then gives its core to others, turn by turn.
"""

import ctypes
from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from attnpred.kernels.numba_tools import fork, pointer, take

TEAM = 1
"""Stands for the address of GOMP_parallel where a team does the work; the count is the address of the team then."""
CAME, OPEN, WORK, DATA, INSIDE, DONE, YIELD = 0, 8, 16, 17, 24, 32, 40
"""Places in a team's memory, in cache lines of their own: who came, the number of the loop that is open (0: none), its
function and data, how many helpers are in it, whether the token is done; the address of sched_yield."""
FIELDS = 48
_SPINS = 400


def new_team() -> Any:
    """Return the memory of a team."""
    team = np.zeros(FIELDS, np.int64)
    team[YIELD] = _YIELD
    return team


try:
    _YIELD = ctypes.cast(ctypes.CDLL(None).sched_yield, ctypes.c_void_p).value or 0
except (AttributeError, OSError, TypeError):
    _YIELD = 0

_LONG = ir.IntType(64)


def _at(builder: Any, address: Any) -> Any:
    return builder.inttoptr(address, _LONG.as_pointer())


@intrinsic
def seen(typing: Any, address: Any) -> Any:
    """Return the number at `address`, as all threads see it."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.load_atomic(_at(builder, arguments[0]), "seq_cst", 8)

    return types.int64(types.int64), generate


@intrinsic
def show(typing: Any, address: Any, value: Any) -> Any:
    """Write the number to `address`, for all threads, and all that was written before."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        builder.store_atomic(arguments[1], _at(builder, arguments[0]), "seq_cst", 8)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), generate


@intrinsic
def add(typing: Any, address: Any, value: Any) -> Any:
    """Add to the number at `address`, for all threads."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        builder.atomic_rmw("add", _at(builder, arguments[0]), arguments[1], "seq_cst")
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), generate


@intrinsic
def call(typing: Any, work: Any, data: Any) -> Any:
    """Call the function at `work` with the address `data`."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        byte = ir.IntType(8).as_pointer()
        kind = ir.FunctionType(ir.VoidType(), [byte]).as_pointer()
        work, data = builder.inttoptr(arguments[0], kind), builder.inttoptr(arguments[1], byte)
        builder.call(work, [data])
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), generate


@intrinsic
def _pause(typing: Any) -> Any:
    """Tell the core that it waits, where it wants to know."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        if context.codegen().magic_tuple()[0].startswith("x86_64"):
            kind = ir.FunctionType(ir.VoidType(), [])
            builder.call(builder.module.declare_intrinsic("llvm.x86.sse2.pause", fnty=kind), [])
        return context.get_dummy_value()

    return types.void(), generate


@intrinsic
def _yield(typing: Any, address: Any) -> Any:
    """Call sched_yield, at `address`."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        kind = ir.FunctionType(ir.IntType(32), []).as_pointer()
        builder.call(builder.inttoptr(arguments[0], kind), [])
        return context.get_dummy_value()

    return types.void(types.int64), generate


@numba.njit
def _wait(team: int, turns: int) -> None:
    """Wait a little, for the `turns`-th time."""
    address = numba.carray(pointer(team), FIELDS, np.int64)[YIELD]
    if turns < _SPINS or address == 0:
        _pause()
    else:
        _yield(address)


@numba.njit
def _lead(team: int, work: int, data: int) -> None:
    """Do the loop with those who come, and return when it is done."""
    show(team + 8 * WORK, work)
    show(team + 8 * DATA, data)
    f = numba.carray(pointer(team), FIELDS, np.int64)
    f[DONE + 1] += 1
    show(team + 8 * OPEN, f[DONE + 1])
    call(work, data)
    show(team + 8 * OPEN, 0)
    turns = 0
    while seen(team + 8 * INSIDE):
        _wait(team, turns)
        turns += 1


@numba.njit
def help_out(team: int) -> None:
    """Help with one loop after the other, until the token is done."""
    last, turns = 0, 0
    while not seen(team + 8 * DONE):
        number = seen(team + 8 * OPEN)
        if number == 0 or number == last:
            _wait(team, turns)
            turns += 1
            continue
        add(team + 8 * INSIDE, 1)
        number = seen(team + 8 * OPEN)  # the leader closes a loop before it looks who is inside
        if number:
            call(seen(team + 8 * WORK), seen(team + 8 * DATA))
            last = number
        add(team + 8 * INSIDE, -1)
        turns = 0


@numba.njit
def leads(team: int) -> bool:
    """Return whether the caller, one of the threads of a region, leads: the first to come."""
    return take(team + 8 * CAME) == 0


@numba.njit
def share_out(parallel: int, count: int, work: int, data: int) -> None:
    """Have the function at `work` called with the address `data`: by `count` threads, or by a team."""
    if parallel == TEAM:
        _lead(count, work, data)
    else:
        fork(parallel, count, work, data)
