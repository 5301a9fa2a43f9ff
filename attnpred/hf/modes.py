"""Modes of torch that are the caller's, autocast and inference mode, and how the sparse path lives with them.

Under `torch.autocast` (also that of accelerate) a model hands over queries and keys of one type and values of another, and
stock attention makes all of them autocast's. So does a `TieredLayer`, once, when it stores them. Below that autocast is
off: our own arithmetic chooses its types of number itself, and compiled code is told what it gets.

Under `torch.inference_mode` torch makes tensors that nothing may change outside of it. A cache outlives the call that
fills it, so all of its own tensors are ordinary ones, made with inference mode off.
"""

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from typing import ParamSpec, TypeVar

import torch

P = ParamSpec("P")
R = TypeVar("R")


def _is_autocast_on(device: torch.device) -> bool:
    return torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type)


def attending_dtype(device: torch.device, dtype: torch.dtype) -> torch.dtype:
    """Return the type of number that attention computes in, given queries or keys of `dtype`."""
    return torch.get_autocast_dtype(device.type) if _is_autocast_on(device) else dtype


def without_autocast(device: torch.device) -> AbstractContextManager[object]:
    """Return a `with` block in which autocast is off; it costs nothing where it is off already."""
    return torch.autocast(device.type, enabled=False) if _is_autocast_on(device) else nullcontext()


def without_inference_mode() -> AbstractContextManager[object]:
    """Return a `with` block whose new tensors are ordinary ones; without gradients, where inference mode was on."""
    if not torch.is_inference_mode_enabled():
        return nullcontext()
    stack = ExitStack()
    stack.enter_context(torch.inference_mode(False))
    stack.enter_context(torch.no_grad())  # which the line before switches on
    return stack


def in_ordinary_mode(function: Callable[P, R]) -> Callable[P, R]:
    """Make what a method of a cache keeps ordinary tensors."""

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        if not torch.is_inference_mode_enabled():
            return function(*args, **kwargs)
        with without_inference_mode():
            return function(*args, **kwargs)

    return call
