"""The files are those of the safetensors library, whole or refused; and a saved one is a tier that is only read."""

import gc
import json
import os
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from attnpred import files
from attnpred.errors import CacheFileError, ShapeError, StoreError, TierFullError
from attnpred.store.positioned import read_fully
from attnpred.store.safetensors_file import DTYPES, Entry, SafetensorsFile, write
from attnpred.store.saved import SavedTier
from attnpred.store.tier import buffer

SHAPES = st.lists(st.integers(0, 5), max_size=3).map(tuple)
TENSORS = st.dictionaries(
    st.text(min_size=1, max_size=8), st.tuples(st.sampled_from([*DTYPES.values()]), SHAPES), max_size=5
)
TEXTS = st.dictionaries(st.text(max_size=8), st.text(max_size=8), max_size=3)
FDS = Path("/dev/fd")
REPEATED = {"deadline": None, "derandomize": True, "suppress_health_check": [HealthCheck.function_scoped_fixture]}


def some(dtype: torch.dtype, shape: tuple[int, ...], seed: int = 0) -> Tensor:
    """Return a tensor of any bits that `dtype` may have."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randint(0, 2 if dtype == torch.bool else 256, (*shape, dtype.itemsize), generator=generator)
    return values.to(torch.uint8).view(dtype).reshape(shape)


def in_pieces(name: str, tensor: Tensor, size: int) -> Entry:
    return Entry(name, tensor.dtype, tuple(tensor.shape), tensor.flatten().split(size))


def equal(a: Tensor, b: Tensor) -> bool:
    same = torch.equal(a.flatten().view(torch.uint8), b.flatten().view(torch.uint8))
    return a.dtype == b.dtype and a.shape == b.shape and same


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def save(path: Path, value: int = 1) -> Path:
    write(path, [in_pieces("a", torch.full((100, 7), value), 33)], {"kind": "test"})
    return path


@given(tensors=TENSORS, metadata=TEXTS, size=st.integers(1, 50))
@settings(max_examples=60, **REPEATED)
def test_the_library_reads_what_is_written(
    tmp_path: Path, tensors: dict[str, Any], metadata: dict[str, str], size: int
) -> None:
    path = tmp_path / "a.safetensors"
    wanted = {name: some(*kind, seed=i) for i, (name, kind) in enumerate(tensors.items())}
    write(path, [in_pieces(name, tensor, size) for name, tensor in wanted.items()], metadata)
    with safe_open(path, "pt") as file:
        assert set(file.keys()) == set(wanted) and (file.metadata() or {}) == metadata
        assert all(equal(file.get_tensor(name), tensor) for name, tensor in wanted.items())
    own = SafetensorsFile(path)
    assert set(own.names) == set(wanted) and own.metadata == metadata
    for name, tensor in wanted.items():
        assert equal(own.tensor(name), tensor) and (own.dtype(name), own.shape(name)) == (tensor.dtype, tensor.shape)
    own.close()


@given(tensors=TENSORS.filter(len), metadata=TEXTS)  # the library writes no valid file of metadata alone (0.8.0)
@settings(max_examples=60, **REPEATED)
def test_what_the_library_writes_is_read(tmp_path: Path, tensors: dict[str, Any], metadata: dict[str, str]) -> None:
    path = tmp_path / "a.safetensors"
    wanted = {name: some(*kind, seed=i) for i, (name, kind) in enumerate(tensors.items())}
    save_file(wanted, path, metadata)
    file = SafetensorsFile(path)
    assert set(file.names) == set(wanted) and file.metadata == metadata
    assert all(equal(file.tensor(name), tensor) for name, tensor in wanted.items())
    raw = path.read_bytes()
    for name, tensor in wanted.items():
        place = file.place(name)
        assert raw[place : place + tensor.nbytes] == bytes(buffer(tensor))
    file.close()


def test_all_types_are_known(tmp_path: Path) -> None:
    write(tmp_path / "a", [in_pieces(str(dtype), some(dtype, (3, 8)), 5) for dtype in DTYPES.values()], {})
    with safe_open(tmp_path / "a", "pt") as file:
        assert all(equal(file.get_tensor(str(dtype)), some(dtype, (3, 8))) for dtype in DTYPES.values())
    assert SafetensorsFile(tmp_path / "a").metadata == {}


def test_data_are_in_order_and_aligned_and_for_the_user_alone(tmp_path: Path) -> None:
    old = os.umask(0)
    try:
        write(tmp_path / "a", [in_pieces(name, some(torch.uint8, (9,)), 2) for name in "zay"], {})
    finally:
        os.umask(old)
    file = SafetensorsFile(tmp_path / "a")
    assert file.names == ["z", "a", "y"] and [file.place(name) % 4096 for name in file.names] == [0, 9, 18]
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o600


# Writing


def test_bytes_reach_the_disk_before_the_name_and_the_name_before_the_return(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    sync, replace = os.fsync, Path.replace

    def spy_sync(fd: int) -> None:
        calls.append("folder" if stat.S_ISDIR(os.fstat(fd).st_mode) else f"{os.fstat(fd).st_size} bytes")
        sync(fd)

    def spy_replace(old: Path, new: Path) -> Path:
        calls.append("name")
        return replace(old, new)

    monkeypatch.setattr(os, "fsync", spy_sync)
    monkeypatch.setattr(Path, "replace", spy_replace)
    size = save(tmp_path / "a").stat().st_size
    assert calls == [f"{size} bytes", "name", "folder"]


def broken(tensor: Tensor) -> Iterator[Tensor]:
    yield tensor
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("pieces", "error", "message"),
    [
        ([torch.zeros(2)], ShapeError, "got 8 bytes of 'x', expected 12"),
        ([torch.zeros(2), torch.zeros(2)], ShapeError, "up to byte 16, expected .* up to byte 12"),
        ([torch.zeros(3, dtype=torch.int32)], ShapeError, r"got a piece of 'x', \(3,\) of torch.int32"),
        ([torch.zeros(6)[::2]], ShapeError, "expected contiguous"),
        ([torch.zeros(3, device="meta")], ShapeError, "on meta"),
        (broken(torch.zeros(1)), KeyboardInterrupt, "^$"),
    ],
)
def test_a_writer_that_fails_changes_nothing(tmp_path: Path, pieces: Any, error: type[Exception], message: str) -> None:
    before = save(tmp_path / "a").read_bytes()
    with pytest.raises(error, match=message):
        write(
            tmp_path / "a", [in_pieces("first", torch.ones(10_000), 999), Entry("x", torch.float32, (3,), pieces)], {}
        )
    assert names(tmp_path) == {"a"} and (tmp_path / "a").read_bytes() == before


@pytest.mark.parametrize("function", ["write", "fsync", "replace"])
def test_a_disk_that_fails_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, function: str) -> None:
    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    before = save(tmp_path / "a").read_bytes()
    descriptors = names(FDS)
    with (
        monkeypatch.context() as context,
        pytest.raises(CacheFileError, match=f"No space left on device for {tmp_path}/a"),
    ):
        context.setattr(Path if function == "replace" else os, function, fail)
        save(tmp_path / "a", 2)
    assert names(tmp_path) == {"a"} and (tmp_path / "a").read_bytes() == before
    assert len(names(FDS)) == len(descriptors)


def test_a_disk_that_takes_little_at_a_time_gets_everything(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before, write_some = save(tmp_path / "a").read_bytes(), os.write
    with monkeypatch.context() as context:
        context.setattr(os, "write", lambda fd, data: write_some(fd, data[:100]))
        save(tmp_path / "b")
    assert (tmp_path / "b").read_bytes() == before


def test_where_nothing_can_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    for path in (tmp_path / "folder", tmp_path / "none" / "a"):
        with pytest.raises(CacheFileError, match=f"{path}.*, expected .* name "):
            save(path)
    assert names(tmp_path) == {"folder"}


def test_entries_that_make_no_file_are_named(tmp_path: Path) -> None:
    entry = in_pieces("a", torch.zeros(1), 1)
    for entries in (
        [entry, entry],
        [in_pieces("__metadata__", torch.zeros(1), 1)],
        [in_pieces("a", torch.zeros(1).to(torch.complex64), 1)],
    ):
        with pytest.raises(CacheFileError, match="expected a new name, and a type safetensors knows"):
            write(tmp_path / "a", entries, {})
    assert not names(tmp_path)


WRITER = """
import os, pathlib, runpy, sys, time
with runpy.run_path(sys.argv[1])["replacing"](pathlib.Path(sys.argv[2])) as fd:
    os.write(fd, b"half")
    print("ready", flush=True)
    time.sleep(60)
"""


def test_a_killed_writer_leaves_the_old_file_and_what_the_next_one_removes(tmp_path: Path) -> None:
    path = tmp_path / "a[1].safetensors"
    before = save(path).read_bytes()
    command = [sys.executable, "-c", WRITER, files.__file__, str(path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as writer:
        try:
            assert writer.stdout is not None and writer.stdout.readline() == b"ready\n"
            save(path)  # beside a living writer
            (left,) = names(tmp_path) - {path.name}
            assert left.startswith(f".{path.name}.{writer.pid}.") and left.endswith(".tmp")
        finally:
            writer.kill()
    assert path.read_bytes() == before and (tmp_path / left).read_bytes() == b"half"
    others = [tmp_path / name for name in (f"{left}.kept", f".{path.name}.tmp", left.replace("a[1]", "a1"))]
    for other in others:
        other.touch()
    save(path, 2)
    assert names(tmp_path) == {path.name, *(other.name for other in others)}
    assert SafetensorsFile(path).tensor("a")[0, 0] == 2


def test_a_temporary_file_that_another_writer_removed_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lock, stolen = files.fcntl.flock, []

    def steal_first(fd: int, operation: int) -> None:
        if not stolen:
            stolen.extend(tmp_path.iterdir())
            stolen[0].unlink()
        lock(fd, operation)

    monkeypatch.setattr(files.fcntl, "flock", steal_first)
    save(tmp_path / "a")
    assert len(stolen) == 1 and names(tmp_path) == {"a"}


# Reading


def raw(header: object, data: bytes = b"", length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def one(**changes: object) -> dict[str, object]:
    return {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8], **changes}}


EIGHT = bytes(8)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"text",
        b"some other kind of file",
        raw(b"{", EIGHT),
        raw(b"\xff{}"),
        raw(b"[" * 100_000),
        raw([]),
        raw("text"),
        raw(1),
        raw({"a": 1}),
        raw({"__metadata__": {"a": 1}}),
        raw({"__metadata__": []}),
        raw({}, b"x"),
        raw({}, length=2**63),
        raw(one(), EIGHT + b"x"),
        raw(one(dtype="F33"), EIGHT),
        raw(one(dtype=[]), EIGHT),
        raw(one(shape=[3]), EIGHT),
        raw(one(shape=2), EIGHT),
        raw(one(shape=[-2]), EIGHT),
        raw(one(shape=[-1, -2]), EIGHT),
        raw(one(shape=[2.0]), EIGHT),
        raw(one(shape=[True, 2]), EIGHT),
        raw(one(shape=[0, 2**62], data_offsets=[0, 0])),
        raw(one(shape="2"), EIGHT),
        raw(one(data_offsets=[8, 16]), EIGHT + EIGHT),
        raw(one(data_offsets=[-8, 0]), EIGHT),
        raw(one(data_offsets=[8, 0]), EIGHT),
        raw(one(data_offsets=[0]), EIGHT),
        raw({**one(), "b": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}, EIGHT),
        raw({**one(), "b": one()["a"]}, EIGHT + EIGHT),
    ],
)
def test_a_damaged_file_is_named(tmp_path: Path, content: bytes) -> None:
    assert SafetensorsFile(written(tmp_path / "good", raw(one(), EIGHT))).tensor("a").tolist() == [0, 0]
    path, descriptors = written(tmp_path / "bad", content), len(names(FDS))
    with pytest.raises(
        CacheFileError, match=f"^got .* in {path}, expected a whole safetensors file: save the cache again$"
    ) as caught:
        SafetensorsFile(path)
    assert caught.traceback and len(names(FDS)) == descriptors  # closed, though the error holds all that it passed


def test_a_header_too_long_is_not_read(tmp_path: Path) -> None:
    path = written(tmp_path / "a", raw({}, length=100_000_001))
    os.truncate(path, 200_000_000)  # a hole, which takes no room
    with pytest.raises(CacheFileError, match="got a header of 100000001 bytes"):
        SafetensorsFile(path)


def test_the_order_of_the_header_means_nothing(tmp_path: Path) -> None:
    pair = {name: {"dtype": "U8", "shape": [1], "data_offsets": [i, i + 1]} for i, name in enumerate("ab")}
    empty = {"dtype": "U8", "shape": [0], "data_offsets": [1, 1]}
    file = SafetensorsFile(written(tmp_path / "a", raw({"b": pair["b"], "none": empty, "a": pair["a"]}, b"xy")))
    assert (
        file.names == ["a", "none", "b"]
        and file.tensor("b").tolist() == [ord("y")]
        and file.tensor("none").tolist() == []
    )


def written(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def test_a_truncated_file_is_named_whatever_its_length(tmp_path: Path) -> None:
    save_file({"a": torch.arange(20), "b": torch.ones(3)}, tmp_path / "whole")
    content = (tmp_path / "whole").read_bytes()
    for length in range(len(content)):
        with pytest.raises(CacheFileError, match=f"truncated.* in {tmp_path}/part"):
            SafetensorsFile(written(tmp_path / "part", content[:length]))


@given(data=st.data())
@settings(max_examples=300, **REPEATED)
def test_a_header_of_other_bytes_is_read_or_refused(tmp_path: Path, data: st.DataObject) -> None:
    content = bytearray(raw({"__metadata__": {"a": "b"}, **one(shape=[0, 1], data_offsets=[0, 0])}))
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.sampled_from(b'0129{}[],:"a \xff'))
    try:
        file = SafetensorsFile(written(tmp_path / "a", bytes(content)))
    except CacheFileError:
        return
    for name in file.names:
        assert file.tensor(name).shape == file.shape(name)


def test_no_file_and_no_tensor_are_named(tmp_path: Path) -> None:
    none = tmp_path / "none"
    with pytest.raises(
        CacheFileError, match=f"^got No such file or directory for {none}, expected a saved cache: check"
    ):
        SafetensorsFile(none)
    with pytest.raises(
        CacheFileError, match=f"^got {tmp_path}, which is no file, expected a saved cache: check the name$"
    ):
        SafetensorsFile(tmp_path)
    file = SafetensorsFile(save(tmp_path / "a"))
    for ask in (file.tensor, file.shape, file.dtype, file.place):
        with pytest.raises(CacheFileError, match=f"got no tensor 'b' in {tmp_path}/a"):
            ask("b")


def test_a_file_that_got_shorter_is_named(tmp_path: Path) -> None:
    path = save(tmp_path / "a")
    file = SafetensorsFile(path)
    os.truncate(path, path.stat().st_size - 1)
    with pytest.raises(CacheFileError, match=f"got the end of {path} at byte {path.stat().st_size}"):
        file.tensor("a")
    with pytest.raises(StoreError, match=f"got the end of {path} at byte"):
        SavedTier(file).read(file.place("a") + 5000, [memoryview(bytearray(5600))])


def test_it_is_closed_once_and_when_nobody_holds_it(tmp_path: Path) -> None:
    file = SafetensorsFile(save(tmp_path / "a"))
    inner, number = file._file, file.fileno()
    file.close()
    file.close()
    assert inner.closed
    other = os.open(tmp_path / "a", os.O_RDONLY)  # takes the number
    assert other == number
    file.close()
    with pytest.raises(StoreError, match=f"got {tmp_path}/a closed"):
        file.tensor("a")
    os.fstat(other)
    os.close(other)
    file = SafetensorsFile(tmp_path / "a")
    inner = file._file
    del file
    gc.collect()
    assert inner.closed


# Positioned reads, and the tier


@given(sizes=st.lists(st.integers(0, 9), max_size=30), place=st.integers(0, 20), most=st.integers(1, 40))
@settings(max_examples=80, **REPEATED)
def test_buffers_are_filled_however_little_comes_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sizes: list[int], place: int, most: int
) -> None:
    content = bytes(some(torch.uint8, (300,)).tolist())
    written(tmp_path / "a", content)

    def little(fd: int, buffers: list[memoryview], at: int) -> int:
        data, done = os.pread(fd, most, at), 0
        for target in buffers:
            part = data[done : done + len(target)]
            target[: len(part)] = part
            done += len(part)
        return done

    buffers = [memoryview(bytearray(size)) for size in sizes]
    with (tmp_path / "a").open("rb") as file, monkeypatch.context() as context:
        context.setattr(os, "preadv", little)
        read_fully(file.fileno(), place, buffers, "a")
    assert b"".join(buffers) == content[place : place + sum(sizes)]


def test_more_buffers_than_one_call_takes(tmp_path: Path) -> None:
    content = bytes(some(torch.uint8, (9000,)).tolist())
    buffers = [memoryview(bytearray(index % 4)) for index in range(5000)]
    with written(tmp_path / "a", content).open("rb") as file:
        read_fully(file.fileno(), 7, buffers, "a")
    assert b"".join(buffers) == content[7 : 7 + sum(map(len, buffers))]


def test_a_failed_read_is_named(tmp_path: Path) -> None:
    with (
        written(tmp_path / "a", b"abc").open("ab") as file,
        pytest.raises(StoreError, match=r"at byte 1 of a\.b, expected to"),
    ):
        read_fully(file.fileno(), 1, [memoryview(bytearray(1))], "a.b")


def test_a_saved_file_is_a_tier_that_is_only_read(tmp_path: Path) -> None:
    path = save(tmp_path / "a")
    file = SafetensorsFile(path)
    inner, place = file._file, file.place("a")
    tier, other = SavedTier(file), SavedTier(file)
    del file
    got = torch.zeros(3, dtype=torch.int64), torch.zeros(5, dtype=torch.int64)
    tier.read(place + 8 * 692, [buffer(x) for x in got])
    assert torch.cat(got).tolist() == [1] * 8 and tier.used() == {} and tier.describe() == str(path)
    before = path.read_bytes()
    with pytest.raises(TierFullError, match=f"got 8 bytes for {path}"):
        tier.allocate(8)
    with pytest.raises(StoreError, match=f"got 5 bytes to write to {path}"):
        tier.write(place, memoryview(b"12345"))
    tier.release(place, 8)
    tier.flush()
    assert path.read_bytes() == before
    tier.close()
    tier.close()
    with pytest.raises(StoreError, match=f"got a read of {path} after it was closed"):
        tier.read(place, [buffer(got[0])])
    other.read(place, [buffer(got[0])])  # the file is there for the other one
    assert not inner.closed
    other.close()
    gc.collect()
    assert inner.closed
