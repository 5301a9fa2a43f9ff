"""How long torch's threads spin before they sleep, which has to be said before torch is loaded.

At the end of a parallel region a thread of GNU's OpenMP spins for some milliseconds, in case another one follows. At rest
that is right: to wake it costs a model with small operations a third of its token. Beside other programs it takes the core
that they, or the thread that has something to do, would need: a token was up to 40 times as slow (docs/LOG.md). So where
others run already when a command starts, threads sleep after about 40 microseconds.
"""

import os
import sys
from collections.abc import MutableMapping

SPINS = 2000
NAMES = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")


def wait_briefly_if_busy(environment: MutableMapping[str, str]) -> None:
    """Write it to the environment, unless somebody else has, the machine is at rest, or torch is loaded already."""
    if "torch" in sys.modules or not hasattr(os, "getloadavg") or any(name in environment for name in NAMES):
        return
    if os.getloadavg()[0] >= (os.cpu_count() or 1) / 2:
        environment["GOMP_SPINCOUNT"] = str(SPINS)
