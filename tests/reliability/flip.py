"""The flip matrix: a file is damaged while nobody looks, and then used: it is refused, or the damage changes nothing.

A scratch file of the disk tier is damaged between two tokens of the cache that it belongs to; all others lie still.
"""

import os
import random
from collections.abc import Callable
from itertools import islice
from pathlib import Path

import torch

import attnpred
from tests.hf.support import SMALL, offloaded
from tests.models import tiny_model
from tests.reliability.outcome import Outcome
from tests.reliability.things import THINGS, logits, read_prompt

SECTOR = 512
WRITES = 5
"""How often a file is written before it is damaged: rows are then five cells."""


def _flip(data: bytearray, chance: random.Random) -> None:
    place = chance.randrange(len(data))
    while not data[place]:  # most of a scratch file is room that nothing was written to
        place = chance.randrange(len(data))
    data[place] ^= 1 << chance.randrange(8)


def _cut(data: bytearray, chance: random.Random) -> None:
    del data[chance.randrange(len(data)) :]


def _append(data: bytearray, chance: random.Random) -> None:
    data += chance.randbytes(chance.choice((1, 8, 4096)))


def _lose(data: bytearray, chance: random.Random) -> None:
    start = chance.randrange(0, len(data), SECTOR)
    data[start : start + SECTOR] = bytes(len(data[start : start + SECTOR]))


def _swap(data: bytearray, chance: random.Random) -> None:
    size = min(SECTOR, len(data) // 4)
    one, other = (chance.randrange(len(data) // size) * size for _ in range(2))
    data[one : one + size], data[other : other + size] = data[other : other + size], data[one : one + size]


DAMAGE: dict[str, Callable[[bytearray, random.Random], None]] = {
    "a bit flipped": _flip,
    "cut off": _cut,
    "bytes appended": _append,
    "a sector of zeros": _lose,
    "two sectors exchanged": _swap,
}


def flips(folder: Path, times: int, seed: int = 0) -> list[Outcome]:
    """Damage each of `THINGS`, and scratch files, so many times in every way."""
    chance = random.Random(seed)
    return [*_of_files(folder, times, chance), *_of_scratch(folder / "scratch", times, chance)]


def _damaged(data: bytes, damage: Callable[[bytearray, random.Random], None], chance: random.Random) -> bytes:
    while True:
        changed = bytearray(data)
        damage(changed, chance)
        if changed != data:
            return bytes(changed)


def _of_files(folder: Path, times: int, chance: random.Random) -> list[Outcome]:
    found = []
    for kind in THINGS:
        with kind(folder / kind.__name__) as thing:
            for _ in islice(thing.steps(), WRITES):
                pass
            whole = {name: (thing.folder / name).read_bytes() for name in thing.files()}
            for how, damage in DAMAGE.items():
                outcome = Outcome(f"{thing.name}: {how}")
                for number in range(times):
                    name = chance.choice(list(whole))
                    (thing.folder / name).write_bytes(_damaged(whole[name], damage, chance))
                    outcome.count(f"{name} {number}", thing.wrong)
                    (thing.folder / name).write_bytes(whole[name])
                found.append(outcome)
    return found


def _of_scratch(folder: Path, times: int, chance: random.Random) -> list[Outcome]:
    model, found = tiny_model("llama"), []
    config = offloaded(SMALL, "disk", folder)
    with attnpred.attach(model, policy="predicted", config=config) as handle:
        with handle.new_cache() as cache:
            wanted = logits(read_prompt(cache, 0))
        for how, damage in DAMAGE.items():
            outcome = Outcome(f"scratch file: {how}")
            for number in range(times):
                with handle.new_cache() as cache:
                    read_prompt(cache, 0)
                    assert cache.backing is not None
                    cache.backing.tier.flush()
                    (path,) = folder.iterdir()
                    _overwrite(path, _damaged(path.read_bytes(), damage, chance))

                    def check(cache: attnpred.TieredCache = cache) -> str | None:
                        return None if torch.equal(logits(cache), wanted) else "it went on with other tokens"

                    outcome.count(f"{path.name} {number}", check)
                if list(folder.iterdir()):
                    outcome.add_wrong(f"{number}: a scratch file is left behind")
            found.append(outcome)
    return found


def _overwrite(path: Path, data: bytes) -> None:
    """Give the file these bytes; it stays the same file, which its owner has open."""
    with path.open("r+b") as file:
        file.write(data)
        file.flush()
        os.ftruncate(file.fileno(), len(data))
