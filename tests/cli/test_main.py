"""Exit codes and the one line that a user's mistake gets."""

import errno
import os
import subprocess
import sys
from collections.abc import Callable

import pytest

from attnpred.cli import main as command_line
from attnpred.errors import ConfigError


def fails_with(error: BaseException) -> Callable[[], None]:
    def command() -> None:
        """Fail."""
        raise error

    return command


def test_no_arguments_show_the_commands(capsys: pytest.CaptureFixture[str]) -> None:
    assert command_line.main([]) == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in command_line.COMMANDS)


@pytest.mark.parametrize("name", command_line.COMMANDS)
def test_every_command_has_help(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert command_line.main([name, "--help"]) == 0
    assert f"attnpred {name}" in capsys.readouterr().out


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert command_line.main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("attnpred 0.")


@pytest.mark.parametrize("arguments", [["no-such-command"], ["info", "--no-such-option"], ["info", "surplus"]])
def test_a_usage_error_is_one_line(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert command_line.main(arguments) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("attnpred: ") and said.err.count("\n") == 1 and "--help" in said.err


def test_an_error_of_ours_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(command_line.COMMANDS, "info", fails_with(ConfigError("got 1,\nexpected 2")))
    assert command_line.main(["info"]) == 2
    assert capsys.readouterr().err == "attnpred: got 1, expected 2\n"


def test_an_interrupt_is_quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(command_line.COMMANDS, "info", fails_with(KeyboardInterrupt()))
    assert command_line.main(["info"]) == 130


def test_a_bug_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(command_line.COMMANDS, "info", fails_with(RuntimeError("a bug")))
    with pytest.raises(RuntimeError, match="a bug"):
        command_line.main(["info"])


def test_a_refusal_of_the_machine_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    full = OSError(errno.ENOSPC, "No space left on device", "/a/file")
    monkeypatch.setitem(command_line.COMMANDS, "info", fails_with(full))
    assert command_line.main(["info"]) == 2
    said = "attnpred: got No space left on device for /a/file, expected room and permission: mend that, and run again\n"
    assert capsys.readouterr().err == said


PRINTER = "import sys; from attnpred.cli import main; main.COMMANDS['info'] = lambda: print('{}'); sys.exit(main.main(['info']))"
OUTPUTS = {
    "full": ("x", ">/dev/full", "got No space left on device for what was to be printed, expected room"),
    "full and long": (
        "x" * 100_000,
        ">/dev/full",
        "got No space left on device for what was to be printed, expected room",
    ),
    "closed": ("x", ">&-", "got a closed stdout, expected an open one: send it to a file or to /dev/null"),
    "of other letters": (
        "\u2028",
        ">/dev/null",
        "got text that cannot be printed as ascii, expected UTF-8: set PYTHONUTF8=1",
    ),
}


@pytest.mark.parametrize("output", OUTPUTS)
def test_a_stdout_that_takes_nothing_is_one_line(output: str) -> None:
    text, where, said = OUTPUTS[output]
    found = subprocess.run(
        ["sh", "-c", f'exec "$0" "$@" {where}', sys.executable, "-c", PRINTER.format(text)],
        stderr=subprocess.PIPE, text=True, env=os.environ | {"PYTHONIOENCODING": "ascii"},
    )  # fmt: skip
    assert found.returncode == 2 and found.stderr.startswith(f"attnpred: {said}") and found.stderr.count("\n") == 1


def test_with_stderr_closed_the_exit_code_tells() -> None:
    code = PRINTER.format("x").replace("['info']))", "['none']))")
    found = subprocess.run(["sh", "-c", 'exec "$0" "$@" 2>&-', sys.executable, "-c", code], stdout=subprocess.PIPE)
    assert (found.returncode, found.stdout) == (2, b"")


WRITERS = {"typer": "arguments = ['--help']", "print": "main.COMMANDS['info'] = lambda: print(1); arguments = ['info']"}


@pytest.mark.parametrize("writer", WRITERS.values(), ids=WRITERS)
def test_a_closed_pipe_is_quiet(writer: str) -> None:
    code = f"import sys; from attnpred.cli import main; {writer}; sys.stdin.read(); sys.exit(main.main(arguments))"
    with subprocess.Popen([sys.executable, "-c", code], stdin=-1, stdout=-1, stderr=-1) as process:
        assert process.stdin and process.stdout and process.stderr
        process.stdout.close()
        process.stdin.close()  # only now does it begin to write
        assert process.stderr.read() == b""
        assert process.wait() == command_line.PIPE_CLOSED
