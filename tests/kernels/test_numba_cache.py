"""Compiled functions are kept where nobody else can write, or not at all: numba's files are pickles, which run code."""

import os
import pickle
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

numba = pytest.importorskip("numba")

from attnpred.kernels import numba_cache  # noqa: E402
from attnpred.kernels.numba_tools import compiled  # noqa: E402


def twice(x: int) -> int:
    return 2 * x


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The cache folder of a user for whom nothing has been compiled or said yet."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(numba.config, "CACHE_DIR", "")
    numba_cache._say.cache_clear()
    yield tmp_path / "cache"
    numba_cache._say.cache_clear()


def compile_twice() -> bool:
    """Compile `twice`, and return whether it came from the cache."""
    function: Any = compiled("int64(int64)")(twice)
    assert function(21) == 42
    return bool(function.stats.cache_hits)


def kept(home: Path) -> list[Path]:
    return sorted(path for path in home.rglob("*") if path.is_file())


def said(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records]


class Planted:
    """Says so when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.mark),)


def test_compiled_once_per_machine_for_the_user_alone(home: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert not numba_cache.is_filled()
    before = os.umask(0o002)  # as where every user has a group
    try:
        assert [compile_twice(), compile_twice()] == [False, True]
    finally:
        os.umask(before)
    assert len(kept(home)) == 2
    assert all(path.stat().st_mode & 0o022 == 0 for path in (home, *home.rglob("*")))
    assert (home / "attnpred" / "kernels").stat().st_mode & 0o777 == 0o700
    assert said(caplog) == [] and numba.config.CACHE_DIR == ""


@pytest.mark.parametrize("which", ["cache", "attnpred", "kernels", "folder", "inner", "file"])
@pytest.mark.parametrize("mode", [0o020, 0o002])
def test_what_others_may_write_is_not_read(home: Path, which: str, mode: int, caplog: pytest.LogCaptureFixture) -> None:
    compile_twice()
    index = next(path for path in kept(home) if path.suffix == ".nbi")
    inner = index.parent
    places = {"cache": home, "attnpred": home / "attnpred", "kernels": home / "attnpred" / "kernels"}
    place = (places | {"folder": inner.parent, "inner": inner, "file": index})[which]
    place.chmod(place.stat().st_mode | mode)
    mark = home.parent / "mark"
    index.write_bytes(pickle.dumps(Planted(mark)))
    assert not compile_twice() and not compile_twice()
    assert not mark.exists()
    (message,) = said(caplog)
    assert f"others may write to {place};" in message and "NUMBA_CACHE_DIR" in message


def test_the_plant_would_work(home: Path) -> None:
    compile_twice()
    mark = home.parent / "mark"
    for path in kept(home):
        path.write_bytes(pickle.dumps(Planted(mark)))
    compile_twice()
    assert mark.exists()


@pytest.mark.skipif(not hasattr(os, "getuid") or os.getuid() != 0, reason="only root can give a file away")
@pytest.mark.parametrize("which", ["cache", "inner", "file"])
def test_what_belongs_to_another_user_is_not_read(home: Path, which: str, caplog: pytest.LogCaptureFixture) -> None:
    compile_twice()
    index = kept(home)[0]
    place = {"cache": home, "inner": index.parent, "file": index}[which]
    os.chown(place, 12345, 12345)
    assert not compile_twice()
    assert f"{place} belongs to another user;" in said(caplog)[0]


def test_links_do_not_hide_the_folder_they_lead_to(home: Path, caplog: pytest.LogCaptureFixture) -> None:
    elsewhere = home.parent / "elsewhere"
    (elsewhere / "deep").mkdir(parents=True)
    home.symlink_to(elsewhere / "deep")
    compile_twice()
    assert compile_twice() and said(caplog) == []
    elsewhere.chmod(0o777)
    assert not compile_twice()
    assert f"others may write to {elsewhere};" in said(caplog)[0]


def test_a_linked_file_is_not_read(home: Path, caplog: pytest.LogCaptureFixture) -> None:
    compile_twice()
    index = kept(home)[0]
    index.rename(home.parent / "moved")
    index.symlink_to(home.parent / "moved")
    assert not compile_twice() and str(index) in said(caplog)[0]


@pytest.mark.parametrize("variable", ["XDG_CACHE_HOME", "CACHE_DIR"])
def test_relative_folders_are_ignored(home: Path, variable: str, monkeypatch: pytest.MonkeyPatch) -> None:
    work = home.parent / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("XDG_CACHE_HOME", "mine")
    if variable == "CACHE_DIR":
        monkeypatch.setattr(numba.config, "CACHE_DIR", "mine")
    compile_twice()
    assert compile_twice() and kept(home / ".cache" / "attnpred") and list(work.iterdir()) == []


def test_numbas_own_setting_names_the_folder(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(numba.config, "CACHE_DIR", str(home.parent / "other"))
    compile_twice()
    assert compile_twice() and kept(home.parent / "other") and not home.exists()


@pytest.mark.parametrize("how", ["a file in the way", "no home", "damaged", "disk full"])
def test_where_nothing_can_be_kept_it_is_compiled_all_the_same(
    home: Path, how: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    if how == "a file in the way":  # also root cannot write then
        home.write_bytes(b"")
    elif how == "no home":
        monkeypatch.delenv("XDG_CACHE_HOME")
        monkeypatch.setenv("HOME", "relative")
    elif how == "damaged":
        compile_twice()
        for path in kept(home):
            path.write_bytes(b"\x80")
    else:

        def fill(self: Any, *arguments: Any) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr("numba.core.caching.IndexDataCacheFile._save_index", fill)
    assert not compile_twice() and not compile_twice()
    (message,) = said(caplog)
    assert message.startswith("compiled kernels are not kept")


@pytest.mark.parametrize("how", ["cfunc", "njit"])
def test_an_error_of_the_source_is_not_hidden(home: Path, how: str) -> None:
    with pytest.raises(numba.core.errors.TypingError):
        compiled("int64(CPointer(int64))", to_address=how == "cfunc")(lambda x: x.no_such_thing)


@pytest.mark.slow
def test_a_read_only_container_generates(tmp_path: Path) -> None:
    """Nowhere to write: neither the cache folder, nor the package's own, nor a home."""
    (tmp_path / "wall").write_bytes(b"")
    code = """
import attnpred, torch
from tests.hf.support import SMALL, greedy
from tests.models import prompt, tiny_model
model = tiny_model("llama")
with attnpred.attach(model, policy="ema", config=SMALL) as attached:
    greedy(model, prompt(1, 100), 4)
print(attached.stats()["total"]["sparse_steps"])
"""
    names = ("XDG_CACHE_HOME", "HOME", "NUMBA_CACHE_DIR")
    places = {name: str(tmp_path / "wall" / "inside") for name in names}
    result = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | places, capture_output=True, text=True, timeout=600
    )
    assert result.returncode == 0 and result.stdout.strip() == "9", result.stderr
    assert result.stderr.count("compiled kernels are not kept") == 1
