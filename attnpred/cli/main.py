"""The command `attnpred`: the table of its commands, and what happens to their errors.

To add a command: one file here with a function, and one line in `COMMANDS`. `attnpred --help` imports every command
file, so a command imports torch and whatever needs torch inside its function (a test holds that).

Exit codes: 0 done; 2 a user's mistake, or the machine's refusal (no room, no permission), told in one line on stderr; 130
interrupted; 1, quietly, when nobody reads the output any more (typer's own choice). Anything else is a bug, and its
traceback is shown.
"""

import os
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any

import typer

from attnpred.cli.analyse_layers import analyse_layers
from attnpred.cli.bench import bench
from attnpred.cli.capture import capture
from attnpred.cli.chat import chat
from attnpred.cli.demo import demo
from attnpred.cli.eval import evaluate
from attnpred.cli.generate import generate
from attnpred.cli.info import info
from attnpred.cli.lm_eval import lm_eval
from attnpred.cli.models import models
from attnpred.cli.report import report
from attnpred.cli.serve import serve
from attnpred.cli.train import train
from attnpred.cli.waits import wait_briefly_if_busy
from attnpred.errors import AttnpredError, OutputError

COMMANDS: dict[str, Callable[..., None]] = {
    "demo": demo,
    "generate": generate,
    "chat": chat,
    "serve": serve,
    "capture": capture,
    "train": train,
    "analyse-layers": analyse_layers,
    "eval": evaluate,
    "report": report,
    "lm-eval": lm_eval,
    "bench": bench,
    "models": models,
    "info": info,
}

PASSES_ON = {name: {"allow_extra_args": True, "ignore_unknown_options": True} for name in ("bench", "lm-eval")}
"""Commands that hand further options to somebody else."""

LONGEST = 300
"""Letters of a word of a complaint: what was given may be of any length."""
USER_ERROR, INTERRUPTED, PIPE_CLOSED = 2, 130, 1


def _version(wanted: bool) -> None:
    if wanted:
        from attnpred import __version__

        typer.echo(f"attnpred {__version__}")
        raise typer.Exit


def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and leave.")
    ] = False,
) -> None:
    """Long-context decoding for transformers models, with a small part of the KV cache in fast memory."""


def build() -> typer.Typer:
    """Return the application with every command of `COMMANDS`."""
    app = typer.Typer(
        name="attnpred",
        add_completion=False,
        pretty_exceptions_enable=False,
        rich_markup_mode=None,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    app.callback()(_root)
    for name, command in COMMANDS.items():
        app.command(name, context_settings=PASSES_ON.get(name))(command)
    return app


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; return its exit code."""
    arguments = list(sys.argv[1:] if arguments is None else arguments) or ["--help"]
    if sys.stderr is None:  # closed: notes would go to stdout instead
        sys.stderr = Path(os.devnull).open("w")  # noqa: SIM115 (for the rest of the process)
    try:
        if sys.stdout is None:  # a file that is opened now would take its number
            raise OutputError("got a closed stdout, expected an open one: send it to a file or to /dev/null")
        if arguments[0] != "bench":  # which measures others too, as they come
            wait_briefly_if_busy(os.environ)
        code = _run(arguments)
        sys.stdout.flush()  # here rather than at exit, where what goes wrong could not be caught
    except AttnpredError as error:
        return _complain(error)
    except (KeyboardInterrupt, typer.Abort):
        return INTERRUPTED
    except BrokenPipeError:
        _drop_output()
        return PIPE_CLOSED
    except OSError as error:  # of the machine, not of the program: no such file, no room, no permission
        _drop_output()
        place = error.filename or "what was to be printed"
        return _complain(
            f"got {error.strerror or error} for {place}, expected room and permission: mend that, and run again"
        )
    except UnicodeEncodeError as error:
        return _complain(f"got text that cannot be printed as {error.encoding}, expected UTF-8: set PYTHONUTF8=1")
    return code


def _drop_output() -> None:
    """Send what is left to flush nowhere: it would fail again at exit."""
    with suppress(OSError):  # no descriptor: it is no file
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _run(arguments: list[str]) -> int:
    try:
        result: Any = build()(args=arguments, prog_name="attnpred", standalone_mode=False)
    except Exception as error:
        # Usage errors of typer's versions share no public base class; they all have this method.
        if not hasattr(error, "format_message"):
            raise
        context = getattr(error, "ctx", None)
        path = context.command_path if context else "attnpred"
        return _complain(f"{error.format_message()} (see {path} --help)")
    return result if isinstance(result, int) else 0


def _complain(message: object) -> int:
    text = str(message).encode(errors="backslashreplace").decode()  # a name of other bytes
    words = (word if len(word) <= LONGEST else f"{word[: LONGEST // 2]}...{word[-20:]}" for word in text.split())
    print("attnpred:", " ".join(words), file=sys.stderr)
    return USER_ERROR
