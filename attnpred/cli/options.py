"""The settings of a cache as options of a command: one for each field of `CacheConfig`, made from the field.

A command that attends takes one parameter `config: CacheConfig`, and the decorator `cache_options` gives it the options
instead, after its own. The field gives an option its name, its default and its words; its type says how the text is read.
So nothing is forwarded by hand, and a setting is an option of every command as soon as it exists. `none` is None
wherever a field takes that.
"""

import inspect
import re
from collections.abc import Callable, Mapping
from dataclasses import Field, fields
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_type_hints

import typer

from attnpred.config import CacheConfig
from attnpred.errors import ConfigError

DtypeOption = Annotated[
    str, typer.Option(metavar="DTYPE", help="Weights as float32, bfloat16 or float16; auto: see `attnpred info`.")
]
"""`--dtype` of every command that loads a model."""

WeightsOption = Annotated[
    str | None,
    typer.Option(
        metavar="WORD",
        help="Of linear layers on a CPU: int8 or int4 reads them in so few bits, float as they are by our own kernels; "
        "left out: by torch.",
    ),
]
"""`--weights` of the same commands."""

_NOTHING: Mapping[str, Any] = {}
_Command = TypeVar("_Command", bound=Callable[..., None])


def _whole(text: str) -> int:
    return int(text)


def _budget(text: str) -> int | float:
    """A share up to 1 is a float, tokens are whole: 1 is everything, 1024 and 1024.0 are tokens."""
    number = float(text)
    return int(number) if number > 1 and number.is_integer() else number


def _layers(text: str) -> int | tuple[int, ...]:
    """A number of layers, or with a comma the numbers of single ones (`13,` is one)."""
    found = tuple(int(part) for part in re.split(r"[,\s]+", text.strip()) if part)
    return found if "," in text else found[0]


def _numbers(text: str) -> tuple[float, ...]:
    return tuple(float(part) for part in re.split(r"[,\s]+", text.strip()) if part)


def _weights(text: str) -> str | tuple[float, ...]:
    return text if text == "adaptive" else _numbers(text)


def _switch(text: str) -> bool:
    return {"true": True, "false": False}[text.lower()]


READERS: dict[Any, tuple[str, str, Callable[[str], Any]]] = {
    int: ("INTEGER", "a whole number", _whole),
    int | None: ("INTEGER", "a whole number, or none", _whole),
    float: ("NUMBER", "a number", float),
    float | None: ("NUMBER", "a number, or none", float),
    int | float: ("NUMBER", "a number of tokens, or a share of the context up to 1", _budget),
    int | tuple[int, ...]: ("LAYERS", "a whole number of at least 0, or numbers of layers: 0,1,13", _layers),
    tuple[float, ...] | None: ("NUMBERS", "numbers with commas between them, or none", _numbers),
    str | tuple[float, ...] | None: ("NUMBERS", "adaptive, numbers with commas between them, or none", _weights),
    bool | None: ("YES|NO", "true, false or none", _switch),
    str | None: ("WORD", "a word, or none", str),
    str | Path | None: ("PATH", "a path, or none", Path),
}
"""By the type of a field: what help calls the value, what a message expects, and how its text is read."""


def cache_options(
    *, defaults: Mapping[str, Any] = _NOTHING, fixed: Mapping[str, Any] = _NOTHING
) -> Callable[[_Command], Callable[..., None]]:
    """Return a decorator that gives a command an option for each field of `CacheConfig`, instead of its `config`.

    defaults: of this command alone, for what it is about; fixed: fields that the command sets itself, which are no options.
    """

    def decorate(command: _Command) -> Callable[..., None]:
        kinds = get_type_hints(CacheConfig)
        own = {one.name: one for one in fields(CacheConfig) if one.name not in fixed}
        usual = {name: defaults.get(name, one.default) for name, one in own.items()}

        def run(**given: Any) -> None:
            settings = {name: read(name, kinds[name], given.pop(name)) for name in own}
            command(**given, config=CacheConfig(**{**fixed, **settings}))

        options = [_option(one, kinds[name], usual[name]) for name, one in own.items()]
        hints = get_type_hints(command, include_extras=True)
        parameters = [
            parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY, annotation=hints[name])
            for name, parameter in inspect.signature(command).parameters.items()
            if name != "config"
        ] + options
        run.__name__, run.__doc__, run.__module__ = command.__name__, command.__doc__, command.__module__
        run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        return run

    return decorate


def read(name: str, kind: Any, given: Any) -> Any:
    """Return the value of a field from what the command line gave. Raises `ConfigError`."""
    if not isinstance(given, str):  # a switch, or left out
        return given
    _, expected, reader = READERS[kind]
    if given == "none" and expected.endswith("none"):
        return None
    try:
        return reader(given)
    except (ValueError, LookupError):
        raise ConfigError(f"got {name}={given!r}, expected {expected}") from None


def option_name(name: str) -> str:
    """Return how the command line spells a field."""
    return "--" + name.replace("_", "-")


def _option(field: "Field[Any]", kind: Any, default: Any) -> inspect.Parameter:
    about = field.metadata["about"]
    spelled = option_name(field.name)
    if kind is bool:
        made: Any = Annotated[bool, typer.Option(f"{spelled}/--no-{spelled[2:]}", help=about)]
    else:
        shown = READERS[kind][0]
        made = Annotated[str if default is not None else str | None, typer.Option(spelled, metavar=shown, help=about)]
        default = None if default is None else _spell(default)
    return inspect.Parameter(field.name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=made)


def _spell(value: Any) -> str:
    return (
        ",".join(map(str, value))
        if isinstance(value, tuple)
        else f"{value:g}"
        if isinstance(value, float)
        else str(value)
    )
