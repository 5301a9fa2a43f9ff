"""What became of injected faults: counts for `docs/reliability.md`, and for tests that nothing was wrong.

Every matrix (`kill.py`, `flip.py`, `soak.py` here, and `tests/cli/matrix.py`) returns rows of `Outcome`; tests run a small
one, `tools.reliability` a large one.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

from attnpred.errors import AttnpredError

SHOWN = 5
"""Wrong ones that are described; all are counted."""


@dataclass(slots=True)
class Outcome:
    """what: the thing and how it was hurt. injected = survived + refused + wrong; wrong_ones: the first of these, in words.

    survived: the answer, or the file, is exactly what it is without the fault. refused: one line said so.
    midway: of kills, those that came in the middle of a write: a half-written file was left behind.
    """

    what: str
    injected: int = 0
    survived: int = 0
    refused: int = 0
    wrong: int = 0
    midway: int = 0
    wrong_ones: list[str] = field(default_factory=list)

    def count(self, where: str, check: Callable[[], str | None]) -> None:
        """Count one fault: `check` returns what is wrong or None, or raises; `where` says which fault it was."""
        self.injected += 1
        try:
            found = check()
        except AttnpredError as error:
            text = str(error)
            if "\n" in text or "expected" not in text:
                self.add_wrong(f"{where}: refused without advice in one line: {text[:200]}")
            else:
                self.refused += 1
        except Exception as error:  # anything else is a traceback to the user
            self.add_wrong(f"{where}: {type(error).__name__}: {str(error)[:200]}")
        else:
            if found is None:
                self.survived += 1
            else:
                self.add_wrong(f"{where}: {found}")

    def add_wrong(self, words: str) -> None:
        """Count one that is wrong."""
        self.wrong += 1
        if len(self.wrong_ones) < SHOWN:
            self.wrong_ones.append(words)

    def as_dict(self) -> dict[str, Any]:
        """Return it as JSON holds it."""
        return asdict(self)
