"""Options made from `CacheConfig`: every field is one, with the field's default and words; texts are read by its type."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import typer
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from attnpred.cli.main import COMMANDS
from attnpred.cli.options import cache_options, option_name
from attnpred.config import CacheConfig
from attnpred.errors import ConfigError

FIELDS = {field.name: field for field in dataclasses.fields(CacheConfig)}
ATTENDING = ["chat", "demo", "generate", "eval", "info", "serve"]
OF_ITSELF = {"demo": {"budget", "measure_recovery"}, "eval": {"budget", "dense_when_fits", "measure_recovery"}}
"""Settings that are no options of a command, because they are what it is about."""


def parsed(*arguments: str, **of_decorator: Any) -> CacheConfig:
    """Return the settings that a command with these arguments gets."""
    seen: list[CacheConfig] = []

    @cache_options(**of_decorator)
    def command(first: str, config: CacheConfig, last: int = 3) -> None:
        """Do nothing."""
        assert (first, last) == ("here", 3)
        seen.append(config)

    app = typer.Typer(add_completion=False)
    app.command()(command)
    result = CliRunner().invoke(app, ["here", *arguments])
    if result.exception is not None:
        raise result.exception
    return seen[0]


def test_nothing_given_is_the_library_s_own() -> None:
    assert parsed() == CacheConfig()


EXAMPLES: dict[str, tuple[str, Any]] = {
    "estimate_rest": ("true", True),
    "budget": ("0.25", 0.25),
    "block_size": ("8", 8),
    "num_sink_tokens": ("128", 128),
    "recent_window": ("96", 96),
    "history": ("8", 8),
    "calibration_interval": ("7", 7),
    "selection_interval": ("2", 2),
    "dense_layers": ("0,3", (0, 3)),
    "late_share": ("0.5", 0.5),
    "hysteresis": ("1e-3", 1e-3),
    "layer_budgets": ("1,2.5", (1.0, 2.5)),
    "head_budgets": ("adaptive", "adaptive"),
    "offload": ("cpu", "cpu"),
    "fast_limit": ("1024", 1024),
    "fetch_timeout": ("5", 5.0),
    "layer_groups": ("groups.json", Path("groups.json")),
    "own_sinks": ("0", 0),
    "own_recent": ("64", 64),
}
NEEDS_OFFLOAD = {
    "offload_dir": ("here", Path("here")),
    "offload_dtype": ("int8", "int8"),
    "host_limit": ("5", 5),
    "disk_limit": ("6", 6),
}


@pytest.mark.parametrize("name", FIELDS)
def test_every_field_can_be_set_and_sets_nothing_else(name: str) -> None:
    more: dict[str, Any] = {}
    if isinstance(default := FIELDS[name].default, bool):
        arguments, value = [option_name(name) if not default else f"--no-{option_name(name)[2:]}"], not default
    elif name in NEEDS_OFFLOAD:
        text, value = NEEDS_OFFLOAD[name]
        arguments, more = [option_name(name), text, "--offload", "disk"], {"offload": "disk"}
    elif name == "distant_gate":
        arguments, value = [option_name(name), "0.7", "--layer-groups", "g"], 0.7
        more = {"layer_groups": Path("g")}
    else:
        text, value = EXAMPLES[name]
        arguments = [option_name(name), text]
    assert parsed(*arguments) == CacheConfig(**{name: value, **more})


@pytest.mark.parametrize("command", ATTENDING)
def test_a_command_shows_every_field_with_its_default_and_words(command: str) -> None:
    app = typer.Typer(add_completion=False, rich_markup_mode=None)
    app.command()(COMMANDS[command])
    shown = " ".join(CliRunner(env={"COLUMNS": "200"}).invoke(app, ["--help"]).output.split())
    for name, field in FIELDS.items():
        if name in OF_ITSELF.get(command, ()):
            continue
        assert option_name(name) in shown, name
        if "`" not in field.metadata["about"]:
            assert " ".join(field.metadata["about"].split()[:6]) in shown, name
        if isinstance(field.default, int) and not isinstance(field.default, bool):
            assert f"[default: {field.default}]" in shown.partition(option_name(name))[2][:600], name


def test_what_a_command_fixes_is_no_option_and_its_own_defaults_can_be_undone() -> None:
    assert parsed(fixed={"budget": 1.0}) == CacheConfig(budget=1.0)
    with pytest.raises(SystemExit):
        parsed("--budget", "64", fixed={"budget": 1.0})
    own = {"offload": "disk", "late_share": 0.06}
    assert parsed(defaults=own) == CacheConfig(**own)
    assert parsed("--offload", "none", "--late-share", "none", defaults=own) == CacheConfig()


@given(st.one_of(st.floats(0.001, 1), st.integers(160, 1 << 20)))
def test_a_budget_is_a_share_or_whole_tokens(budget: int | float) -> None:
    found = parsed("--budget", str(budget)).budget
    assert found == budget and type(found) is type(budget)


@pytest.mark.parametrize(
    ("option", "text", "expected"),
    [
        ("--budget", "much", "got budget='much', expected a number of tokens, or a share of the context up to 1"),
        ("--block-size", "1.5", "got block_size='1.5', expected a whole number"),
        ("--calibration-interval", "never", "got calibration_interval='never', expected a whole number, or none"),
        ("--block-size", "none", "got block_size='none', expected a whole number"),
        ("--dense-layers", "two", "got dense_layers='two', expected a whole number of at least 0, or numbers of layers: 0,1,13"),
        ("--dense-layers", "", "got dense_layers='', expected a whole number of at least 0"),
        ("--dense-layers", "-1", "got dense_layers=-1, expected a whole number of at least 0"),
        ("--head-budgets", "fair", "got head_budgets='fair', expected adaptive, numbers with commas between them, or none"),
        ("--layer-budgets", "1;2", "got layer_budgets='1;2', expected numbers with commas between them, or none"),
        ("--offload", "tape", "got offload='tape', expected one of None, 'cpu', 'disk'"),
        ("--block-size", "24", "got num_sink_tokens="),
    ],
)  # fmt: skip
def test_a_wrong_text_is_one_line(option: str, text: str, expected: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parsed(option, text)
    assert str(caught.value).startswith(expected) and "\n" not in str(caught.value)


def test_python_readers_see_the_words_too() -> None:
    assert all(f"\n{name}: {field.metadata['about']}" in str(CacheConfig.__doc__) for name, field in FIELDS.items())
