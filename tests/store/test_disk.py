"""The scratch file: made late, private, locked, gone afterwards; and what a disk can do to its user."""

import errno
import os
import re
import resource
import signal
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from attnpred.errors import StoreError, TierFullError
from attnpred.store import disk, scratch
from attnpred.store.disk import DiskTier
from attnpred.store.scratch import BEGIN
from tests.forks import end_of, forked

DATA = bytes(range(256)) * 40


def filled(folder: Path | None) -> tuple[DiskTier, int]:
    tier = DiskTier(folder)
    place = tier.allocate(len(DATA))
    tier.write(place, memoryview(DATA))
    return tier, place


def read(tier: DiskTier, place: int, *sizes: int) -> bytes:
    buffers = [bytearray(size) for size in sizes or (len(DATA),)]
    tier.read(place, [memoryview(buffer) for buffer in buffers])
    return b"".join(buffers)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def failing(number: int) -> Callable[..., int]:
    """Return a system call that fails with `number`."""

    def call(*_: object) -> int:
        raise OSError(number, os.strerror(number))

    return call


def descriptors() -> int:
    return len(list(Path("/dev/fd").iterdir()))


def holder(folder: Path) -> tuple[int, Path]:
    """Return a process that has a filled tier and stays, and its file."""
    here, there = os.pipe()

    def job() -> None:
        tier, _ = filled(folder)
        os.write(there, str(tier.path).encode())
        signal.pause()

    process = forked(job)
    os.close(there)  # so that the fork's death would be the end of it
    path = Path(os.read(here, 1000).decode())
    os.close(here)
    return process, path


# The file


def test_is_made_late_and_private(tmp_path: Path) -> None:
    folder = tmp_path / "a" / "b"
    tier = DiskTier(folder)
    assert tier.path is None and not folder.exists() and str(folder) in tier.describe()
    tier.allocate(1000)
    assert tier.path is not None and tier.path.parent == folder
    assert re.fullmatch(rf"attnpred-{os.getpid()}-[0-9a-f]{{16}}\.kv", tier.path.name)
    assert tier.describe() == str(tier.path)
    assert [mode(path) for path in (tier.path, folder, folder.parent)] == [0o600, 0o700, 0o700]
    assert tier.path.stat().st_size == BEGIN + 1000
    tier.close()


def test_default_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    for cache, folder in (str(tmp_path / "x"), "x"), ("relative", ".cache"), ("", ".cache"):
        monkeypatch.setenv("XDG_CACHE_HOME", cache)
        tier, _ = filled(None)
        assert tier.path is not None and tier.path.parent == tmp_path / folder / "attnpred" / "kv"
        assert mode(tmp_path / folder) == 0o700
        tier.close()


def test_no_home(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(StoreError, match="name a folder"):
        DiskTier(Path("~nobody-of-that-name/kv"))


def test_platform_without_locks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk, "IS_SUPPORTED", False)
    with pytest.raises(StoreError, match="expected Linux or macOS"):
        DiskTier()


def test_folder_is_found_again_from_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    tier, _ = filled(Path("kv"))
    (tmp_path / "other").mkdir()
    monkeypatch.chdir(tmp_path / "other")
    tier.close()
    assert list((tmp_path / "kv").iterdir()) == []


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP])
def test_folder_that_cannot_be_locked(number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scratch.fcntl, "flock", failing(number))
    with pytest.raises(StoreError, match=f"{re.escape(str(tmp_path))}.*name another folder"):
        DiskTier(tmp_path).allocate(1)
    assert list(tmp_path.iterdir()) == []


def test_folder_that_is_none(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StoreError, match=f"File exists.*{re.escape(str(tmp_path))}.*name another folder"):
        DiskTier(tmp_path / "file" / "kv").allocate(1)


def test_grows_only_for_what_does_not_fit(tmp_path: Path) -> None:
    tier = DiskTier(tmp_path)
    first, second = tier.allocate(1000), tier.allocate(1000)
    assert tier.path is not None
    tier.release(first, 1000)
    assert tier.allocate(1000) == first and tier.path.stat().st_size == BEGIN + 2000
    third = tier.allocate(10)
    assert tier.path.stat().st_size == BEGIN + 2010
    for place, size in (first, 1000), (third, 10), (second, 1000):
        tier.release(place, size)
    assert tier.path.stat().st_size == BEGIN and tier.used() == {"disk": 0}
    again = tier.allocate(10)
    tier.write(again, memoryview(b"0123456789"))
    assert again == BEGIN and read(tier, again, 10) == b"0123456789"
    tier.close()


def test_page_cache_can_be_dropped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    advice: list[int] = []
    monkeypatch.setattr(disk, "FADVISE", lambda fd, start, size, kind: advice.append(kind))
    tier, place = filled(tmp_path)
    tier.drop_page_cache()
    assert advice == [disk.RANDOM, disk.DONTNEED] and read(tier, place) == DATA
    tier.close()


# Its end


def test_closed_before_it_was_made(tmp_path: Path) -> None:
    tier = DiskTier(tmp_path)
    tier.close()
    with pytest.raises(StoreError, match="expected it open"):
        tier.allocate(1)
    assert list(tmp_path.iterdir()) == []


def test_removed_under_us(tmp_path: Path) -> None:
    tier, place = filled(tmp_path)
    assert tier.path is not None
    tier.path.unlink()
    assert read(tier, place) == DATA
    tier.close()


AT_EXIT = """
import os, sys
from pathlib import Path
from attnpred.store.behind import Behind
from attnpred.store.disk import DiskTier

disk, folder = DiskTier(Path(sys.argv[1])), Path(sys.argv[1])
behind = Behind(DiskTier(folder))
for tier in disk, behind:
    tier.write(tier.allocate(1 << 20), memoryview(bytes(1 << 20)))
if os.fork() == 0:
    sys.exit(0)  # with all that Python does at exit
os.wait()
print(len(list(folder.iterdir())), flush=True)
raise ValueError("the end")
"""


@pytest.mark.slow
def test_gone_at_exit_but_not_at_that_of_a_fork(tmp_path: Path) -> None:
    code = [sys.executable, "-W", "ignore::DeprecationWarning", "-c", AT_EXIT, str(tmp_path)]
    done = subprocess.run(code, capture_output=True, text=True, timeout=60)
    assert done.stdout == "2\n" and done.stderr.count("Error") == 1 and "ValueError: the end" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_fork_does_not_use_the_file(tmp_path: Path) -> None:
    tier, place = filled(tmp_path)

    def job() -> None:
        calls: list[Callable[[], object]] = [
            lambda: read(tier, place),
            lambda: tier.write(place, memoryview(b"x")),
            lambda: tier.allocate(1),
            lambda: tier.release(place, len(DATA)),
        ]
        for call in calls:
            with pytest.raises(StoreError, match="does not cross a fork"):
                call()
        tier.close()
        filled(tmp_path)[0].close()

    assert end_of(forked(job)) == 0
    assert tier.path is not None and tier.path.exists() and read(tier, place) == DATA
    tier.close()


def test_files_of_the_living_stay_and_those_of_the_dead_go(tmp_path: Path) -> None:
    (tmp_path / "other.kv").touch()
    (tmp_path / "attnpred-1-x.kv").mkdir()  # no file at all
    mine, place = filled(tmp_path)
    process, theirs = holder(tmp_path)
    try:
        filled(tmp_path)[0].close()
        assert theirs.exists() and theirs.read_bytes()[BEGIN:] == DATA
    finally:
        os.kill(process, signal.SIGKILL)
    assert end_of(process) == -signal.SIGKILL and theirs.exists()
    # The fork has mine too: with it gone, and only then, nobody but me holds it.
    filled(tmp_path)[0].close()
    assert {path.name for path in tmp_path.iterdir()} == {"other.kv", "attnpred-1-x.kv", mine.path.name}
    assert read(mine, place) == DATA
    mine.close()


def test_only_scratch_files_are_ever_removed(tmp_path: Path) -> None:
    """The exact form of the name, and the mark: nobody holds the lock of any of these."""
    (tmp_path / "elsewhere").mkdir()
    exact, second = "attnpred-1-0123456789abcdef.kv", "attnpred-2-0123456789abcdef.kv"
    (tmp_path / "elsewhere" / "target").write_bytes(scratch.MARK)
    (tmp_path / "attnpred-3-0123456789abcdef.kv").symlink_to("elsewhere/target")
    os.mkfifo(tmp_path / "attnpred-4-0123456789abcdef.kv")
    (tmp_path / "attnpred-5-0123456789abcdef.kv").mkdir()
    (tmp_path / "attnpred-6-0123456789abcdef.kv").touch()
    names = (
        "attnpred-book.kv",
        f"{exact}.kv",
        f"x{exact}",
        exact.upper(),
        "attnpred-1-0123456789abcde.kv",
        "attnpred--1.kv",
    )
    for name in names:
        (tmp_path / name).write_bytes(scratch.MARK)
    (tmp_path / second).write_bytes(b"a saved cache" * 10)
    (tmp_path / exact).write_bytes(scratch.MARK + bytes(100))
    before = {path.name for path in tmp_path.iterdir()}
    filled(tmp_path)[0].close()
    assert {path.name for path in tmp_path.iterdir()} == before - {exact}
    assert (tmp_path / "elsewhere" / "target").exists()


def test_cleaned_before_it_is_locked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cleaner that comes between the making of a file and its lock leaves it."""
    flock, seen = scratch.fcntl.flock, list[Path]()

    def raced(fd: int, how: int) -> None:
        if not seen:
            seen.extend(tmp_path.iterdir())
            scratch.clean(tmp_path)
        flock(fd, how)

    monkeypatch.setattr(scratch.fcntl, "flock", raced)
    tier, place = filled(tmp_path)
    assert seen == [tier.path] == list(tmp_path.iterdir()) and read(tier, place) == DATA
    tier.close()


def test_no_room_for_the_mark(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "write", failing(errno.ENOSPC))
    with pytest.raises(TierFullError, match="No space left"):
        DiskTier(tmp_path).allocate(1)
    assert list(tmp_path.iterdir()) == []


def test_many_processes_make_and_clean_at_once(tmp_path: Path) -> None:
    def job() -> None:
        for _ in range(50):
            tier, place = filled(tmp_path)
            assert tier.path is not None and tier.path.exists() and read(tier, place) == DATA
            tier.close()

    assert [end_of(process) for process in [forked(job) for _ in range(4)]] == [0] * 4
    assert list(tmp_path.iterdir()) == []


def test_no_descriptor_is_left_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = descriptors()
    for _ in range(10):
        tiers = [filled(tmp_path)[0] for _ in range(3)]
        assert descriptors() == before + 3
        tiers[0].close()
        del tiers
        test_no_room_for_the_mark(tmp_path, monkeypatch)
        monkeypatch.undo()
        test_folder_that_cannot_be_locked(errno.ENOLCK, tmp_path, monkeypatch)
        monkeypatch.undo()
    assert descriptors() == before


def test_a_read_under_way_keeps_its_descriptor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the number could be another file's by the time that it is used."""
    tier, place = filled(tmp_path)
    preadv = os.preadv

    def late(fd: int, buffers: list[memoryview], at: int) -> int:
        tier.close()
        return preadv(fd, buffers, at)

    before = descriptors()
    monkeypatch.setattr(os, "preadv", late)
    assert read(tier, place) == DATA
    assert descriptors() == before - 1


# A disk that is full, slow in small pieces, or failing


def test_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tier, place = filled(tmp_path)
    assert tier.path is not None

    def fallocate(fd: int, start: int, size: int) -> None:
        os.ftruncate(fd, start + size // 2)
        failing(errno.ENOSPC)()

    monkeypatch.setattr(disk, "FALLOCATE", fallocate)
    with pytest.raises(TierFullError, match=f"No space left.*5000 bytes.*{re.escape(str(tier.path))}"):
        tier.allocate(5000)
    assert tier.path.stat().st_size == BEGIN + len(DATA) and tier.used() == {"disk": len(DATA)}
    monkeypatch.undo()
    assert read(tier, tier.allocate(10), 10) == bytes(10) and read(tier, place) == DATA
    tier.close()


def test_limit_of_the_system(tmp_path: Path) -> None:
    tier, place = filled(tmp_path)
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, old[1]))
    try:
        with pytest.raises(TierFullError, match=f"File too large.*{1 << 20} bytes.*{re.escape(str(tier.path))}"):
            tier.allocate(1 << 20)
        tier.allocate(1 << 10)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
    assert read(tier, place) == DATA
    tier.close()


def test_room_that_cannot_be_reserved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk, "FALLOCATE", failing(errno.EOPNOTSUPP))
    tier, place = filled(tmp_path)
    assert read(tier, place) == DATA and read(tier, tier.allocate(10), 10) == bytes(10)
    monkeypatch.setattr(disk, "FALLOCATE", failing(errno.EIO))
    with pytest.raises(StoreError, match="Input/output error") as caught:
        tier.allocate(1)
    assert not isinstance(caught.value, TierFullError)
    tier.close()


def test_truncated(tmp_path: Path) -> None:
    tier, place = filled(tmp_path)
    assert tier.path is not None
    os.truncate(tier.path, place + 100)
    assert read(tier, place, 100) == DATA[:100]
    for buffers in (101,), (50, 60), (100, 1):
        with pytest.raises(StoreError, match=re.escape(str(tier.path))):
            read(tier, place, *buffers)
    into = torch.zeros(2, 50, dtype=torch.uint8)
    with pytest.raises(StoreError, match=re.escape(str(tier.path))):
        tier.read_many(torch.tensor([place + 10, place + 60]), into)
    tier.close()


def test_failing_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tier, place = filled(tmp_path)
    monkeypatch.setattr(os, "preadv", failing(errno.EIO))
    monkeypatch.setattr(os, "pwrite", failing(errno.EIO))
    with pytest.raises(StoreError, match=f"Input/output error.*byte {place + 3} of {re.escape(str(tier.path))}"):
        read(tier, place + 3, 5)
    with pytest.raises(StoreError, match=f"Input/output error.*byte {place + 3} of {re.escape(str(tier.path))}"):
        tier.write(place + 3, memoryview(b"x"))
    tier.close()


def test_calls_that_do_only_a_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    preadv, pwrite = os.preadv, os.pwrite
    monkeypatch.setattr(os, "preadv", lambda fd, buffers, at: preadv(fd, [next(filter(None, buffers))[:700]], at))
    monkeypatch.setattr(os, "pwrite", lambda fd, data, at: pwrite(fd, data[:300], at))
    tier, place = filled(tmp_path)
    assert read(tier, place, 0, 1000, 0, 0, 700, len(DATA) - 1700, 0) == DATA
    monkeypatch.setattr(disk, "BYTES_PER_CALL", 77)
    tier.write(place, memoryview(DATA[::-1]))
    assert read(tier, place) == DATA[::-1]
    tier.close()
