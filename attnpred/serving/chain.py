"""`BlockStore`: keys and values of texts that were read, in blocks that any later prompt with the same beginning takes up.

A block is named by a hash of its tokens and of the block before it, and the first one of everything else that keys and
values depend on: the model's config and weights, the kind of its numbers, and the key of whoever asked. So a name stands for
a whole beginning; the longest one that is here is found by asking for one block after the other; and whoever has another
key finds nothing, in what he is told or in how long it takes. Policy and budget are no part of it: a text is read with full
attention whatever comes after.

Blocks stand at fixed places, large ones first and small ones behind them, and each was computed by one call of the model
with all before it. A prompt is read in these very calls whether it finds blocks or not. So an answer never depends on what
was reused, not even in the last bit.

Those used last stay in memory, up to a limit; all are written behind the answer, each a file of its own: whole or not there,
whatever ends the process, and named alike in all processes of the machine. Above the limit those used longest ago go, the
ends of texts before their beginnings.
"""

import contextlib
import hashlib
import json
import logging
import queue
import re
import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import final

import torch
from torch import Tensor

from attnpred.errors import AttnpredError, CacheFileError, OutputError
from attnpred.hf.saving import check_value
from attnpred.serving.keeping import kept_files, make_room, mark_used, why_unusable
from attnpred.store.safetensors_file import Entry, SafetensorsFile, write

logger = logging.getLogger("attnpred")

BLOCK, SMALL = 256, 64
"""Tokens. A prompt is read in calls of so many; larger ones are no faster (SmolLM2 on two cores). What is left behind the
last large one is read in small ones, so that little has to be read again for the next question."""
FORMAT = "2"
BEHIND = 64
"""Blocks that wait to be written; what comes while so many wait is not kept on disk."""
READERS = 2
"""Blocks that are read from disk at a time: most of it is comparing them with their check values."""
SUMS = "sums"

_NAME = re.compile(r"[0-9a-f]{64}\.block")

Tensors = Mapping[str, Tensor]


@final
@dataclass(frozen=True, slots=True)
class Part:
    """Tokens `start` to `stop` of a text, and the name of that block."""

    start: int
    stop: int
    name: str


def chain(root: str, ids: Sequence[int]) -> list[Part]:
    """Return all full blocks of a text. root: all that its keys and values depend on beside the tokens."""
    large, small = len(ids) // BLOCK * BLOCK, len(ids) // SMALL * SMALL
    borders = [*range(0, large, BLOCK), *range(large, small, SMALL), small]
    parts, parent = [], hashlib.sha256(f"{FORMAT} {root}".encode()).digest()
    for start, stop in pairwise(borders):
        tokens = torch.tensor(ids[start:stop], dtype=torch.int64, device="cpu").numpy().tobytes()
        parent = hashlib.sha256(parent + tokens).digest()
        parts.append(Part(start, stop, parent.hex()))
    return parts


@final
class BlockStore:
    """folder: None keeps nothing on disk. limit: bytes there; memory: bytes of those in memory."""

    def __init__(self, folder: Path | None, limit: int, memory: int) -> None:
        self.folder, self.limit, self.memory = folder, limit, memory
        self.held_bytes = 0
        self._held: OrderedDict[str, Tensors] = OrderedDict()
        self._behind: queue.Queue[tuple[str, Tensors] | None] = queue.Queue(BEHIND)
        self._writer: threading.Thread | None = None
        if folder is not None and limit:
            self._begin(folder)

    def _begin(self, folder: Path) -> None:
        why = why_unusable(folder)
        if why is not None:
            logger.warning("what is read is not kept on disk: %s", why)
            return
        self._writer = threading.Thread(target=self._write_behind, name="attnpred blocks", daemon=True)
        self._writer.start()

    def has(self, name: str) -> bool:
        """Return whether there is a block of that name, now."""
        return name in self._held or (self._writer is not None and self._path(name).is_file())

    def take(self, names: Sequence[str]) -> list[Tensors]:
        """Return the blocks of `names`, successive ones, up to the first that is not here."""
        count = next((number for number, name in enumerate(names) if not self.has(name)), len(names))
        if count > 1:
            with ThreadPoolExecutor(READERS, "attnpred blocks") as pool:
                blocks = list(pool.map(self._get, names[:count]))
        else:
            blocks = list(map(self._get, names[:count]))
        found: list[Tensors] = []
        for block in blocks:
            if block is None:  # damaged, or gone meanwhile
                break
            found.append(block)
        for name, block in reversed(list(zip(names, found, strict=False))):  # beginnings are the last to go
            self._hold(name, block)
            if self._writer is not None:
                mark_used(self._path(name))
        return found

    def put(self, name: str, block: Tensors) -> None:
        """Keep a block, whose tensors nobody changes any more."""
        self._hold(name, block)
        if self._writer is not None:
            with contextlib.suppress(queue.Full):
                self._behind.put_nowait((name, block))

    def close(self) -> None:
        """Write what waits to be written, and end."""
        if self._writer is not None:
            self._behind.put(None)
            self._writer.join()
            self._writer = None

    def _hold(self, name: str, block: Tensors) -> None:
        if name not in self._held:
            self._held[name] = block
            self.held_bytes += _bytes(block)
        self._held.move_to_end(name)
        while self.held_bytes > self.memory and self._held:
            _, other = self._held.popitem(last=False)
            self.held_bytes -= _bytes(other)

    def _path(self, name: str) -> Path:
        return (self.folder or Path()) / f"{name}.block"

    def _get(self, name: str) -> Tensors | None:
        block = self._held.get(name)
        return self._read(name) if block is None else block

    def _read(self, name: str) -> Tensors | None:
        path = self._path(name)
        if self._writer is None or not path.is_file():
            return None
        try:
            file = SafetensorsFile(path)
            sums = json.loads(file.metadata[SUMS])
            block = {part: file.tensor(part) for part in sums}
            if any(check_value(part, tensor) != sums[part] for part, tensor in block.items()):
                raise CacheFileError(f"got other bytes in {path} than were written, expected them unchanged")
        except (AttnpredError, OSError, LookupError, ValueError) as error:
            logger.warning("%s: these tokens are read again", error)
            path.unlink(missing_ok=True)
            return None
        return block

    def _write_behind(self) -> None:
        while (waiting := self._behind.get()) is not None:
            name, block = waiting
            path = self._path(name)
            try:
                if not path.exists():
                    sums = {part: check_value(part, tensor) for part, tensor in block.items()}
                    entries = [Entry(part, x.dtype, tuple(x.shape), [x]) for part, x in block.items()]
                    write(path, entries, {SUMS: json.dumps(sums)})
                    make_room(path.parent, _NAME, self.limit, path)
            except (OutputError, OSError) as error:
                logger.warning("%s: a block is not kept on disk", error)

    def stored_bytes(self) -> int:
        """Return the bytes of all blocks on disk, those of other processes too."""
        if self._writer is None or self.folder is None:
            return 0
        return sum(about.st_size for _, about in kept_files(self.folder, _NAME))


def _bytes(block: Tensors) -> int:
    return sum(tensor.nbytes for tensor in block.values())
