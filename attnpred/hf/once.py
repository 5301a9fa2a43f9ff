"""Making a file or a folder once, whoever wants it: the first process does it, the others wait and find it.

What is made gets its name last, in one step, and its bytes are on the disk by then. A process that dies leaves at most a
work folder, which the next one removes: it holds the lock, so nobody else is at work there.
"""

import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

from filelock import FileLock, Timeout
from tqdm import tqdm

from attnpred.errors import StoreError
from attnpred.folders import make_private


def say(line: str) -> None:
    """Print one line to stderr, beside progress bars."""
    tqdm.write(line, file=sys.stderr)


def once(target: Path, make: Callable[[Path], Path]) -> Path:
    """Return `target`; if it is not there, `make(work)` has made it in the empty folder `work`, where it returned it.

    Raises `StoreError` where nothing can be written.
    """
    if target.exists():
        return target
    try:
        make_private(target.parent)
        lock = FileLock(target.with_name(f".{target.name}.lock"))
        try:
            lock.acquire(timeout=0)
        except Timeout:
            say(f"waiting for another process that makes {target}")
            lock.acquire()
        try:
            if not target.exists():
                _make(target, make)
        finally:
            lock.release()
    except OSError as error:
        raise StoreError(
            f"got {error.strerror or error} for {target}, expected a folder that can be written: "
            f"make room, or name another cache folder by XDG_CACHE_HOME"
        ) from error
    return target


def _make(target: Path, make: Callable[[Path], Path]) -> None:
    work = target.with_name(f".{target.name}.work")
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(mode=0o700)
    try:
        made = make(work)
        for path in [made, *made.rglob("*")]:
            _to_disk(path)
        made.rename(target)
        _to_disk(target.parent)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _to_disk(path: Path) -> None:
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    except OSError:
        if not path.is_dir():  # some file systems cannot do this for a folder
            raise
    finally:
        os.close(number)
