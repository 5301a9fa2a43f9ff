"""Tables for people in a terminal, drawn by rich: columns in line, words that wrap where the terminal is narrow.

Where stdout is no terminal, a line is as long as it has to be, so that a row can be found with grep.
"""

import io
import shutil
import sys
from collections.abc import Sequence

NO_TERMINAL = 10_000
"""Columns of a line that goes to a file or a pipe."""


def drawn(head: Sequence[str], rows: Sequence[Sequence[str]], numbers: bool = False) -> str:
    """Return a table; numbers: all columns but the first are set to the right."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    made = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), show_header=any(head))
    for i, words in enumerate(head):
        made.add_column(Text(words), justify="right" if numbers and i else "left", header_style="", overflow="fold")
    for row in rows:
        made.add_row(*map(Text, row))
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else NO_TERMINAL
    out = io.StringIO()
    Console(file=out, width=width, color_system=None).print(made)
    return "\n".join(line.rstrip() for line in out.getvalue().splitlines())
