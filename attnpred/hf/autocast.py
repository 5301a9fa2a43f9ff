"""Autocast, and how the sparse path lives with it: it attends in the numbers that stock attention would, and no others.

Under `torch.autocast` (also that of accelerate) a model hands over queries and keys of one type and values of another, and
stock attention makes all of them autocast's. So does a `TieredLayer`, once, when it stores them. Below that autocast is
off: our own arithmetic chooses its types of number itself, and compiled code is told what it gets.
"""

from contextlib import AbstractContextManager, nullcontext

import torch


def _is_on(device: torch.device) -> bool:
    return torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type)


def attending_dtype(device: torch.device, dtype: torch.dtype) -> torch.dtype:
    """Return the type of number that attention computes in, given queries or keys of `dtype`."""
    return torch.get_autocast_dtype(device.type) if _is_on(device) else dtype


def without_autocast(device: torch.device) -> AbstractContextManager[None]:
    """Return a `with` block in which autocast is off; it costs nothing where it is off already."""
    return torch.autocast(device.type, enabled=False) if _is_on(device) else nullcontext()
