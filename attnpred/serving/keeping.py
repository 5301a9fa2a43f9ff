"""A folder of the user's own where what was read is kept: whether it can be used, and what goes when it holds too much.

Names are those that the keeper gives; whatever else lies there is somebody's, and is neither counted nor removed. Other
processes keep there and remove there at the same time.
"""

import os
import re
from contextlib import suppress
from pathlib import Path

from attnpred.folders import make_private, why_untrusted


def why_unusable(folder: Path) -> str | None:
    """Make the folder, if it is not there; return why nothing can be kept in it, None if it can."""
    try:
        make_private(folder)
        return why_untrusted(folder)
    except OSError as error:
        return f"{folder}: {error.strerror}"


def kept_files(folder: Path, names: re.Pattern[str]) -> list[tuple[Path, os.stat_result]]:
    """Return the files of such names, and what the system says of them."""
    found = []
    for path in filter(lambda path: names.fullmatch(path.name), folder.iterdir()):
        with suppress(OSError):  # another process has removed it
            found.append((path, path.stat()))
    return found


def make_room(folder: Path, names: re.Pattern[str], limit: int, newest: Path) -> None:
    """Remove the files that were used longest ago, `newest` the last of all, until they have at most `limit` bytes."""
    used = [(path == newest, about.st_mtime, about.st_size, path) for path, about in kept_files(folder, names)]
    total = 0
    for _, _, size, path in sorted(used, reverse=True):
        total += size
        if total > limit:
            path.unlink(missing_ok=True)


def mark_used(path: Path) -> None:
    """Note that a file was used now."""
    with suppress(OSError):  # another process has removed it, or it is still to be written
        os.utime(path)
