"""The safetensors format, written and read in pieces, because a cache may be larger than memory.

The `safetensors` library writes only what is in memory, and maps files, whose page faults are slow and whose read errors
kill the process. Here tensors come and go in pieces, by positioned reads; the format is the same, so that either reads
what the other wrote: a length (8 bytes, little-endian), a JSON object of that length, and the bytes of all tensors without
gaps. The object may end in spaces, which puts the first byte of data at a multiple of 4096.
"""

import json
import math
import os
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, final

import torch
from torch import Tensor

from attnpred.errors import CacheFileError, OutputError, ShapeError, StoreError
from attnpred.files import PRIVATE, put, replacing
from attnpred.store.positioned import read_fully
from attnpred.store.scratch import IS_SUPPORTED
from attnpred.store.tier import buffer

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_METADATA = "__metadata__"
_LONGEST_HEADER = 100_000_000  # the limit of the safetensors library
_ALIGNMENT = 4096


@dataclass(frozen=True)
class Entry:
    """A tensor to write: `pieces`, contiguous and in host memory, are its elements in order, taken one at a time."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    pieces: Iterable[Tensor]

    @property
    def size(self) -> int:
        """Bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


def write(path: Path, tensors: Sequence[Entry], metadata: Mapping[str, str]) -> None:
    """Write `tensors`, in this order, and `metadata` to `path`, for the user alone; all or nothing.

    Raises `CacheFileError` if the file cannot be written, `ShapeError` if pieces are not what their entry promises, and
    whatever the making of a piece raises.
    """
    _expect_platform()
    header = _header(path, tensors, metadata)
    try:
        with replacing(path, PRIVATE) as fd:
            put(fd, header)
            for entry in tensors:
                for piece in _checked(entry):
                    put(fd, buffer(piece))
    except OutputError as error:
        raise CacheFileError(str(error)) from error


def _header(path: Path, tensors: Sequence[Entry], metadata: Mapping[str, str]) -> bytes:
    content: dict[str, Any] = {_METADATA: dict(metadata)}
    end = 0
    for entry in tensors:
        if entry.name in content or entry.dtype not in _NAMES:
            raise CacheFileError(
                f"got {entry.name!r} of {entry.dtype} for {path}, expected a new name, and a type safetensors knows: "
                f"one of {', '.join(_NAMES.values())}"
            )
        start, end = end, end + entry.size
        content[entry.name] = {"dtype": _NAMES[entry.dtype], "shape": entry.shape, "data_offsets": (start, end)}
    text = json.dumps(content, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % _ALIGNMENT)
    if len(text) > _LONGEST_HEADER:
        raise CacheFileError(
            f"got a header of {len(text)} bytes for {path}, expected less than 100 MB: write less text"
        )
    return len(text).to_bytes(8, "little") + text


def _checked(entry: Entry) -> Iterator[Tensor]:
    done = 0
    for piece in entry.pieces:
        done += piece.numel() * piece.element_size()
        if piece.device.type != "cpu" or not piece.is_contiguous() or piece.dtype != entry.dtype or done > entry.size:
            raise ShapeError(
                f"got a piece of {entry.name!r}, {tuple(piece.shape)} of {piece.dtype} on {piece.device}, up to byte "
                f"{done}, expected contiguous {entry.dtype} on cpu, up to byte {entry.size}: give pieces of the tensor"
            )
        yield piece
    if done < entry.size:
        raise ShapeError(f"got {done} bytes of {entry.name!r}, expected {entry.size}: give pieces for all of its shape")


class _Stretch(NamedTuple):
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int  # from the beginning of the file
    size: int


@final
class SafetensorsFile:
    """A safetensors file to read from; raises `CacheFileError` unless it is whole.

    You may assume: reads may run in several threads; the file is closed with `close`, and when nobody holds this any more.
    You must: not `close` it while it is read.
    """

    def __init__(self, path: Path) -> None:
        _expect_platform()
        self.path = path
        if path.exists() and not path.is_file():  # opening a pipe would wait for its writer
            raise CacheFileError(f"got {path}, which is no file, expected a saved cache: check the name")
        try:
            # not the descriptor alone: after `close` its number may be another file's
            self._file = path.open("rb", buffering=0)
        except OSError as error:
            raise CacheFileError(
                f"got {error.strerror or error} for {path}, expected a saved cache: check the name"
            ) from error
        self._finalizer = weakref.finalize(self, self._file.close)
        try:
            self.metadata, self._stretches = _parse(path, self._file.fileno())
        except BaseException:
            self.close()
            raise

    @property
    def names(self) -> list[str]:
        """The tensors, in the order of their bytes."""
        return list(self._stretches)

    def dtype(self, name: str) -> torch.dtype:
        """Return the type of a tensor."""
        return self._stretch(name).dtype

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor."""
        return self._stretch(name).shape

    def place(self, name: str) -> int:
        """Return where the bytes of a tensor start in the file."""
        return self._stretch(name).start

    def tensor(self, name: str) -> Tensor:
        """Read a tensor."""
        dtype, shape, start, _ = self._stretch(name)
        tensor = torch.empty(shape, dtype=dtype, device="cpu")
        _read(self.path, self.fileno(), start, buffer(tensor))
        return tensor

    def _stretch(self, name: str) -> _Stretch:
        if name not in self._stretches:
            raise CacheFileError(f"got no tensor {name!r} in {self.path}, expected one: save the cache again")
        return self._stretches[name]

    def fileno(self) -> int:
        """Return the descriptor, for positioned reads."""
        if self._file.closed:
            raise StoreError(f"got {self.path} closed, expected it open: load the cache again")
        return self._file.fileno()

    def close(self) -> None:
        """Close the file; a second time does nothing."""
        self._finalizer()


def _parse(path: Path, fd: int) -> tuple[dict[str, str], dict[str, _Stretch]]:
    """Return the metadata and the tensors, in the order of their bytes."""

    def damaged(what: str) -> CacheFileError:
        return CacheFileError(f"got {what} in {path}, expected a whole safetensors file: save the cache again")

    size = os.fstat(fd).st_size
    if size < 8:
        raise damaged(f"{size} bytes, truncated,")
    length = int.from_bytes(_read(path, fd, 0, memoryview(bytearray(8))), "little")
    if length > _LONGEST_HEADER:
        raise damaged(f"a header of {length} bytes")
    data = 8 + length
    if size < data:
        raise damaged(f"{size} bytes, truncated before the {data}th,")
    header = bytes(_read(path, fd, 8, memoryview(bytearray(length))))
    try:
        content = json.loads(header.decode())
        metadata = content.pop(_METADATA, {})
        stretches = {name: _stretch(entry, data) for name, entry in content.items()}
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise damaged(f"a header that cannot be read ({type(error).__name__})") from error
    if not isinstance(metadata, dict) or not all(isinstance(text, str) for text in metadata.values()):
        raise damaged("metadata that are not all text")
    stretches = dict(sorted(stretches.items(), key=lambda item: (item[1].start, item[1].size)))
    end = data
    for name, stretch in stretches.items():
        if stretch.start != end:
            raise damaged(f"tensor {name!r} at byte {stretch.start} instead of {end}")
        end += stretch.size
    if size != end:
        raise damaged(f"{size} bytes instead of {end}{', truncated,' * (size < end)}")
    return metadata, stretches


def _stretch(entry: Any, data: int) -> _Stretch:
    """Return a tensor as its entry in the header describes it; raises what a wrong one makes happen."""
    dtype, shape, (start, end) = DTYPES[entry["dtype"]], tuple(entry["shape"]), entry["data_offsets"]
    if any(type(number) is not int or not 0 <= number < 2**63 for number in (*shape, start, end)):
        raise ValueError("a size that is none")
    if math.prod(shape) * dtype.itemsize != end - start or math.prod(max(1, number) for number in shape) >= 2**60:
        raise ValueError("a tensor that does not fit its bytes")
    return _Stretch(dtype, shape, data + start, end - start)


def _read(path: Path, fd: int, place: int, data: memoryview) -> memoryview:
    """Return `data`, filled from byte `place` on."""
    try:
        read_fully(fd, place, [data], str(path))
    except StoreError as error:
        raise CacheFileError(str(error)) from error
    return data


def _expect_platform() -> None:
    if not IS_SUPPORTED:
        raise CacheFileError(
            "got a platform without flock and preadv, expected Linux or macOS: caches are not saved here"
        )
