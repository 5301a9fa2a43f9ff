"""What kind of value each field of a header has, for those that were not written by `save`."""

from collections.abc import Callable
from typing import Any

from attnpred.checks import WHOLE, is_finite


def _text(value: Any) -> bool:
    return type(value) is str


def _text_or_none(value: Any) -> bool:
    return value is None or _text(value)


def _some(value: Any) -> bool:
    return type(value) is int and 1 <= value <= WHOLE


def _plain(value: Any) -> bool:
    return value is None or type(value) in (bool, str) or is_finite(value)


def _plain_fields(value: Any) -> bool:
    """A mapping of texts to plain values, or to lists of them to any depth."""

    def fits(one: Any) -> bool:
        return all(map(fits, one)) if type(one) is list else _plain(one)

    return type(value) is dict and all(_text(name) and fits(one) for name, one in value.items())


def _list_of(fits: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: type(value) is list and all(map(fits, value))


def _by_number(value: Any) -> bool:
    """A mapping of layers, as texts, to the plain fields of each."""
    return type(value) is dict and all(name.isdecimal() and _plain_fields(one) for name, one in value.items())


def _sums(value: Any) -> bool:
    return type(value) is dict and all(type(one) is int and 0 <= one < 1 << 32 for one in value.values())


FITS: dict[str, Callable[[Any], bool]] = {
    "attnpred": _text,
    "model": _text,
    "revision": _text_or_none,
    "fingerprint": _text,
    "config": _text,
    "rope": lambda _: True,  # for people
    "weights": _text,
    "answers": _list_of(_list_of(is_finite)),
    "dtype": _text,
    "block_size": _some,
    "settings": _plain_fields,
    "policy": _text,
    "policy_settings": _plain_fields,
    "predictor": _text_or_none,
    "length": _some,
    "batch": _some,
    "tokens": _text_or_none,
    "layers": _list_of(_plain_fields),
    "decoders": _by_number,
    "sums": _sums,
}
"""Of every field of `Header`, whether a value can be its own."""
