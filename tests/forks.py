"""Processes of a test: a job in a fork, and how that ended."""

import os
import traceback
import warnings
from collections.abc import Callable


def forked(job: Callable[[], object]) -> int:
    """Do `job` in a fork; return its process. It ends with 0 unless `job` raises."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of a fork beside threads: torch's are idle
        process = os.fork()
    if process == 0:
        try:
            job()
            os._exit(0)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(1)
    return process


def end_of(process: int) -> int:
    """Wait for the end of a process; return its exit code, or minus the signal that killed it."""
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
