"""Folders of the user: where what can be made again is kept, made for the user alone, and whom they can be trusted to.

Trusted is what nobody else can have written: every folder of the way belongs to this user or to root, and no one else may
write to it. A folder like /tmp, where all may write but none may touch what is another's, serves as part of the way.
"""

import os
import stat
from collections.abc import Iterator
from pathlib import Path

OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH


def user_cache() -> Path | None:
    """Return `attnpred` in the user's cache folder; None for a user who has none. A relative XDG_CACHE_HOME is ignored."""
    given = Path(os.environ.get("XDG_CACHE_HOME", ""))
    if given.is_absolute():  # the specification of these folders wants relative ones ignored
        return given / "attnpred"
    try:
        home = Path.home()
    except RuntimeError:
        return None
    return home / ".cache" / "attnpred" if home.is_absolute() else None


def make_private(folder: Path) -> None:
    """Make `folder` and its missing parents, for the user alone; leave alone what is there. Raises `OSError`."""
    if not folder.is_dir():
        make_private(folder.parent)
        folder.mkdir(mode=0o700, exist_ok=True)


def why_untrusted(folder: Path) -> str | None:
    """Return why what lies in `folder`, which is there, may be someone else's work; None where it cannot be.

    folder: absolute; its own files and folders, to any depth, are looked at as well. Raises `OSError`.
    """
    if not hasattr(os, "getuid"):  # Windows: a user's folders are closed to others by other means
        return None
    me, way = os.getuid(), folder.resolve()
    # Both ways there, as it is written and as its links lead.
    for place in dict.fromkeys((*folder.parents, *way.parents)):
        about = place.stat()
        if about.st_uid not in (me, 0):
            return f"{place} belongs to another user"
        if about.st_mode & OTHERS_WRITE and not about.st_mode & stat.S_ISVTX:
            return f"others may write to {place}"
    for place in (way, *_inside(way)):
        try:
            about = place.lstat()
        except FileNotFoundError:  # another process has finished writing it, under this name
            continue
        if about.st_uid != me:
            return f"{place} belongs to another user"
        if about.st_mode & OTHERS_WRITE or stat.S_ISLNK(about.st_mode):
            return f"others may write to {place}"
    return None


def _inside(folder: Path) -> Iterator[Path]:
    """Yield everything in `folder`, to any depth; links are not followed."""
    for place, names, files in os.walk(folder, onerror=_raise):
        yield from (Path(place, name) for name in (*names, *files))


def _raise(error: OSError) -> None:
    raise error
