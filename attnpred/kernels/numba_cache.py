"""Where compiled functions are kept, so that each is compiled once per machine, and when they are not kept at all.

numba's files are pickles: who can write one runs code in every process that reads it. So they lie in a folder of our own, in
the user's cache folder or in NUMBA_CACHE_DIR, and are used only if nobody else can have written there
(`attnpred.folders`). Otherwise, and where nothing can be written, functions are compiled for this process alone, which is
said once. numba itself would look in other folders then, unchecked; it is told of no other one.
"""

import contextlib
import functools
import hashlib
import logging
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import numba

from attnpred.folders import OTHERS_WRITE, make_private, user_cache, why_untrusted

logger = logging.getLogger("attnpred")

T = TypeVar("T")

_LOCK = threading.Lock()
"""Of numba's settings, while they are ours."""


def compile_cached(compile_with: Callable[[bool], T]) -> T:
    """Return `compile_with(True)`, which reads and writes numba's cache; `compile_with(False)` where that is no good."""
    folder = _folder()
    if folder is None:
        return compile_with(False)
    try:
        with _kept_in(folder):
            return compile_with(True)
    except Exception as error:  # whatever a damaged file or a full disk can raise; an error of the source comes again
        _say(f"{folder}: {type(error).__name__}: {error}")
        return compile_with(False)


def is_filled() -> bool:
    """Return whether there are compiled functions of this version in the folder."""
    folder = _folder()
    return folder is not None and any(folder.rglob("*.nbi"))


def _folder() -> Path | None:
    """Return the folder, which is there, ours, and can be written; None where there is no such folder."""
    given = Path(numba.config.CACHE_DIR)  # of NUMBA_CACHE_DIR
    base = given if given.is_absolute() else user_cache()
    if base is None:
        _say("the user has no home folder")
        return None
    folder = base / "kernels" / _sources()
    try:
        make_private(folder)
        why = why_untrusted(folder)
        if why is None:
            tempfile.TemporaryFile(dir=folder).close()
            return folder
    except OSError as error:
        why = f"{folder}: {error.strerror}"
    _say(why)
    return None


@functools.cache
def _sources() -> str:
    """Return a name for what all numba files say: a cached function would not notice that one it calls has changed."""
    found = b"".join(path.read_bytes() for path in sorted(Path(__file__).parent.glob("numba_*.py")))
    return hashlib.sha256(found).hexdigest()[:16]


@contextlib.contextmanager
def _kept_in(folder: Path) -> Iterator[None]:
    """Have numba keep what it compiles in `folder`, and nowhere else."""
    settings: Any = numba.config
    wanted = {"CACHE_DIR": str(folder), "CACHE_LOCATOR_CLASSES": "UserProvidedCacheLocator"}
    with _LOCK:
        before = {name: getattr(settings, name, "") for name in wanted}
        vars(settings).update(wanted)
        try:
            yield
        finally:
            vars(settings).update(before)
            for path in folder.rglob("*"):  # numba goes by the umask, which may let a group write
                with contextlib.suppress(FileNotFoundError):  # another process has renamed it
                    mode = path.stat().st_mode
                    if mode & OTHERS_WRITE:
                        path.chmod(mode & ~OTHERS_WRITE)


@functools.cache
def _say(why: str) -> None:
    """Log once that nothing is kept."""
    logger.warning(
        "compiled kernels are not kept, and every process compiles them again: %s; name a folder of yours in NUMBA_CACHE_DIR",
        why,
    )
