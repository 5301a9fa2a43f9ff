"""Where the questions of a conversation come from: a terminal, with a history of lines, or a pipe."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from attnpred.folders import make_private, user_cache

HISTORY_LINES = 1000


def piped() -> Iterator[str]:
    """Yield the lines of stdin that are not blank."""
    yield from (line for line in sys.stdin if line.strip())


def typed(prompt: str = "> ") -> Iterator[str]:
    """Yield the lines that are typed, until Ctrl-D; Ctrl-C begins a line anew."""
    with _history():
        while True:
            try:
                line = input(prompt)
            except EOFError:
                print(file=sys.stderr)
                return
            except KeyboardInterrupt:
                print(file=sys.stderr)
                continue
            if line.strip():
                yield line


@contextmanager
def _history() -> Iterator[None]:
    """Let arrow keys bring earlier lines back, those of earlier sessions too; a file of mode 0600 keeps them."""
    try:
        import readline
    except ImportError:  # not in every build of Python
        yield
        return
    folder = user_cache()
    file = None if folder is None else folder / "chat_history"
    readline.clear_history()
    readline.set_history_length(HISTORY_LINES)
    if file is not None:
        with suppress(OSError):
            readline.read_history_file(file)
    try:
        yield
    finally:
        if file is not None:
            with suppress(OSError):  # nowhere to write: the lines are gone with the session
                _private(file)
                readline.write_history_file(file)


def _private(file: Path) -> None:
    make_private(file.parent)
    file.touch(mode=0o600)
