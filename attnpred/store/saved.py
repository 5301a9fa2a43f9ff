"""`SavedTier`: a saved cache, read where it lies. A place is an offset in its file, and nothing is ever written."""

from collections.abc import Sequence
from typing import final

from torch import Tensor

from attnpred.errors import StoreError, TierFullError
from attnpred.store.positioned import read_fully, read_many
from attnpred.store.safetensors_file import SafetensorsFile
from attnpred.store.tier import Tier


@final
class SavedTier(Tier):
    """Read-only. Several may share one file, which is closed when the last of them, and all else that held it, let go.

    You must: close the tier and not the file, as long as threads read.
    """

    def __init__(self, file: SafetensorsFile) -> None:
        self._name = str(file.path)
        self._file: SafetensorsFile | None = file

    def allocate(self, size: int) -> int:
        """Raise `TierFullError`."""
        raise TierFullError(f"got {size} bytes for {self._name}, expected none: a saved cache is only read")

    def release(self, place: int, size: int) -> None:
        """Do nothing: the file keeps what it has."""

    def write(self, place: int, data: memoryview) -> None:
        """Raise `StoreError`."""
        raise StoreError(f"got {len(data)} bytes to write to {self._name}, expected none: a saved cache is only read")

    def read(self, place: int, buffers: Sequence[memoryview]) -> None:
        """Fill `buffers`, one after the other, with the bytes of the file from `place` on."""
        file = self._open()
        read_fully(file.fileno(), place, buffers, self._name)

    def read_many(self, places: Tensor, into: Tensor) -> None:
        """As in `Tier`."""
        file = self._open()
        read_many(file.fileno(), places, into, self._name)

    def _open(self) -> SafetensorsFile:
        """Return the file, to be held until the read is done, whoever closes the tier meanwhile."""
        if self._file is None:
            raise StoreError(f"got a read of {self._name} after it was closed, expected it open: load the cache again")
        return self._file

    def flush(self) -> None:
        """Do nothing."""

    def used(self) -> dict[str, int]:
        """Return {}: the file is not ours."""
        return {}

    def describe(self) -> str:
        """Return the path of the file."""
        return self._name

    def close(self) -> None:
        """Let go of the file."""
        self._file = None
