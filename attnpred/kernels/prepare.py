"""Compiling the CPU's kernels before anybody waits for a token: once per machine, half a minute; later a moment.

They are compiled when their module is loaded, which is otherwise in the first decode step, after the first token of the
first answer.
"""

import sys
from importlib import import_module

from attnpred.kernels.decoding import HAS_NUMBA

MODULES = tuple(
    f"attnpred.kernels.{name}"
    for name in ("numba_copy", "numba_decode", "numba_digest", "numba_read", "numba_rest", "numba_stream")
)
"""What a decode step may need; these load the others."""


def prepare(device: str) -> None:
    """Load the compiled kernels if a model on a `device` of this type ("cpu", "cuda") needs them."""
    if HAS_NUMBA and device == "cpu":
        for name in MODULES:
            import_module(name)


def takes_time(device: str) -> bool:
    """Return whether `prepare` has to compile, because nothing is kept of an earlier time."""
    if not HAS_NUMBA or device != "cpu" or sys.modules.keys() >= set(MODULES):
        return False
    from attnpred.kernels import numba_cache

    return not numba_cache.is_filled()
