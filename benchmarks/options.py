"""Options of the benchmarks: numbers have bounds, and an output is tried out before anything is measured.

A mistake is a `ConfigError` of one line, as everywhere else in `attnpred`.
"""

import argparse
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from attnpred import checks
from attnpred.errors import ConfigError
from attnpred.files import try_out, write_text


class Options(argparse.ArgumentParser):
    """A parser whose errors are one line; see `checked`."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message} (see {self.prog} -- --help)")

    def checked(self, arguments: Sequence[str] | None) -> argparse.Namespace:
        """Return the options, if a file can be written to `--out`. Raises `ConfigError`, `OutputError`."""
        args = self.parse_args(arguments)
        if (out := vars(args).get("out")) is not None:
            try_out(out)
        return args


def write_line(args: argparse.Namespace, line: str) -> None:
    """Write the last line to `--out` too, if there is one."""
    if args.out is not None:
        write_text(args.out, line + "\n")


def _explained(reader: Callable[[str], Any]) -> Callable[[str], Any]:
    """Let argparse say what `reader` says of a wrong text."""

    def read(text: str) -> Any:
        try:
            return reader(text)
        except ConfigError as error:
            raise argparse.ArgumentTypeError(str(error)) from None
        except ValueError:
            raise argparse.ArgumentTypeError(f"got {checks.shown(text)}, expected a number") from None

    return read


def _share_or_tokens(text: str) -> int | float:
    number = float(text)
    if not checks.is_finite(number) or not 0 < number <= checks.TOKENS:
        raise ConfigError(f"got {number:g}, expected a number of tokens, or a share of the context up to 1")
    return int(number) if number > 1 else number


def _share(text: str) -> float:
    number = float(text)
    if not 0 <= number <= 1:
        raise ConfigError(f"got {number:g}, expected a share from 0 to 1")
    return number


count = _explained(lambda text: checks.whole("number", int(text), 1, checks.TOKENS))
"""Tokens, layers, rounds, steps: at least one."""
budget = _explained(_share_or_tokens)
share = _explained(_share)
