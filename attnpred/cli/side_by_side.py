"""Two answers beside each other in a terminal, the second one as it comes."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def side_by_side(titles: tuple[str, str], first: str) -> Iterator[Callable[[str], None]]:
    """Show the text `first` under its title; the text given to what is yielded grows under the other."""
    from rich import box
    from rich.live import Live
    from rich.table import Table
    from rich.text import Text

    second = Text()
    table = Table(*titles, box=box.SIMPLE_HEAD, expand=True)
    for column in table.columns:
        column.ratio = 1
    table.add_row(Text(first), second)

    def say(text: str) -> None:
        second.append(text)

    with Live(table, refresh_per_second=8):
        yield say
