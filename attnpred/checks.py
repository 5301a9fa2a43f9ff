"""Numbers that come in from outside: whole ones within bounds, finite ones, seeds, temperatures.

Everything that takes a number from a command line or a file asks here, so that a bound is written down once. Bounds are
far beyond what is useful: they are there so that a slip of the hand is an error, and not an hour of waiting.
"""

import math
from typing import Any

from attnpred.errors import AttnpredError, ConfigError

TOKENS = 1 << 24
"""The most tokens of anything: beyond what any model reads, and days of writing."""
WHOLE = (1 << 31) - 1
"""The most of any other whole number: what kernels count with."""
BYTES = (1 << 63) - 1
"""The most bytes of a limit, and the highest seed."""
COLDEST, HOTTEST = 0.01, 100.0
"""Temperatures, beside 0 for greedy: outside of these, half precision ends before the logits do."""


def whole(name: str, value: Any, least: int = 0, most: int = WHOLE, *, error: type[AttnpredError] = ConfigError) -> int:
    """Return `value` if it is a whole number from `least` to `most`."""
    if type(value) is not int or value < least:
        raise error(f"got {name}={shown(value)}, expected a whole number of at least {least}")
    if value > most:
        raise error(f"got {name}={shown(value)}, expected a whole number of at most {most}")
    return value


def is_finite(value: Any) -> bool:
    """Return whether `value` is a finite number; a whole one has at most 64 bits."""
    if type(value) is int:
        return value.bit_length() <= 64
    return type(value) is float and math.isfinite(value)


def seed(value: Any) -> int:
    """Return `value` if it can start every generator."""
    return whole("seed", value, 0, BYTES)


def temperature(value: Any) -> float:
    """Return a temperature of sampling: 0 is greedy."""
    if not is_finite(value) or not (value == 0 or COLDEST <= value <= HOTTEST):
        raise ConfigError(
            f"got temperature={shown(value)}, expected 0 for the likeliest token, or {COLDEST:g} to {HOTTEST:g}"
        )
    return float(value)


def compression(value: Any) -> float:
    """Return how many times less is to be read."""
    if not is_finite(value) or not 1 < value <= TOKENS:
        raise ConfigError(f"got compression={shown(value)}, expected more than 1, and at most {TOKENS}")
    return float(value)


def shown(value: Any) -> str:
    """Return a value for a message, shortened if it is long."""
    if type(value) is int and value.bit_length() > 200:  # more than 4300 digits cannot be printed
        return f"a number of about {round(value.bit_length() * math.log10(2))} digits"
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
