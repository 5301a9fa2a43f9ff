"""The kill matrix: a process that writes for ever is killed at a random moment, and what it leaves is looked at.

The writer is a fork, whose disk is slow and takes only a part of a write at a time, so that many kills come in the middle of
a file. After a kill the old file or the new one is there, whole, and so is all that the writer was told is written; the next
writer goes on and removes what the dead one left behind.
"""

import mmap
import os
import random
import signal
import time
from importlib.util import find_spec
from pathlib import Path

from tests.forks import end_of, forked
from tests.reliability.outcome import Outcome
from tests.reliability.things import ConvertedModel, KeptBlock, Rows, SavedCache, SavedPredictor, Thing

KILLED: tuple[type[Thing], ...] = (
    SavedCache,
    SavedPredictor,
    Rows,
    KeptBlock,
    *([ConvertedModel] if find_spec("gguf") else []),
)
PIECE, PAUSE = 64, 0.0002
"""Bytes that the writer's disk takes in one call, or a third of what it is given, and seconds that it takes."""
PATIENCE = 30.0


def kills(folder: Path, times: int, seed: int = 0) -> list[Outcome]:
    """Kill the writer of each of `KILLED` so many times; those that take their time, a fifth of that."""
    chance = random.Random(seed)
    found = []
    for kind in KILLED:
        outcome = Outcome(kind.name)
        with kind(folder / kind.__name__) as thing:
            next(thing.steps())
            expected = thing.files()
            for number in range(times if thing.pace < 1 else -(-times // 5)):
                confirmed = _kill_one(thing, chance.uniform(0, thing.pace))
                outcome.midway += thing.files() != expected or thing.is_torn()
                outcome.count(f"kill {number}", lambda: thing.wrong(confirmed))  # noqa: B023 (called at once)
                next(thing.steps())
                left, wrong = thing.files(), thing.wrong()
                if left != expected or wrong is not None:
                    outcome.add_wrong(f"kill {number}: the next writer leaves {left}: {wrong}")
        found.append(outcome)
    return found


def _kill_one(thing: Thing, delay: float) -> int:
    """Start a writer and kill it; return how many writes it was told are done, and those of before."""
    done = mmap.mmap(-1, 8)  # shared with the fork
    before = thing.written()

    def job() -> None:
        real = os.write

        def slow_write(fd: int, data: memoryview) -> int:
            time.sleep(PAUSE)
            return real(fd, data[: max(PIECE, len(data) // 3)])

        os.write = slow_write  # type: ignore[assignment] (of this process, which is to die)
        for number, _ in enumerate(thing.steps(), 1):
            done[:8] = number.to_bytes(8, "little")

    process = forked(job)
    until = time.monotonic() + PATIENCE
    while done[:8] == bytes(8) and time.monotonic() < until:
        time.sleep(0.0005)
    time.sleep(delay)
    os.kill(process, signal.SIGKILL)
    code = end_of(process)
    if code != -signal.SIGKILL or done[:8] == bytes(8):
        raise RuntimeError(f"the writer of {thing.name} ended by itself with {code}, or wrote nothing")
    return before + int.from_bytes(done[:8], "little")
