"""A file is written whole or not at all, by any number of writers at once, and nothing but a file is ever replaced."""

import os
import socket
import stat
import threading
from pathlib import Path

import pytest

from attnpred.errors import OutputError
from attnpred.files import PRIVATE, make_folder, put, replacing, target, try_out, write_bytes, write_text


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_what_is_no_file_is_refused_and_left_alone(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    listener = socket.socket(socket.AF_UNIX)
    with listener:
        listener.bind(str(tmp_path / "socket"))
        (tmp_path / "link").symlink_to("pipe")
        (tmp_path / "null").symlink_to("/dev/null")
        before = names(tmp_path)
        for name, kind in {
            "pipe": "a pipe",
            "folder": "a folder",
            "socket": "a socket",
            "link": "a pipe",
            "null": "a device",
            "": "a folder",
        }.items():
            path = tmp_path / name
            with pytest.raises(
                OutputError, match=f"^got '{path}', which is {kind}, expected a file or a new name: name"
            ):
                write_text(path, "x")
    with pytest.raises(OutputError, match=r"^got '/dev/null', which is a device, expected a file"):
        write_text(Path("/dev/null"), "x")
    assert stat.S_ISCHR(Path("/dev/null").stat().st_mode) and stat.S_ISFIFO((tmp_path / "pipe").stat().st_mode)
    assert names(tmp_path) == before


def test_a_link_is_followed_to_its_file(tmp_path: Path) -> None:
    (tmp_path / "far").mkdir()
    (tmp_path / "far" / "file").write_text("old")
    (tmp_path / "link").symlink_to("far/file")
    (tmp_path / "second").symlink_to("link")
    (tmp_path / "dangling").symlink_to("far/new")
    write_text(tmp_path / "second", "new")
    write_text(tmp_path / "dangling", "made")
    assert (tmp_path / "far" / "file").read_text() == "new" and (tmp_path / "far" / "new").read_text() == "made"
    assert all((tmp_path / name).is_symlink() for name in ("link", "second", "dangling"))
    assert names(tmp_path / "far") == {"file", "new"}


def test_where_nothing_can_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    for name in ("none/x", "file/x", "a", "a/x", "zero\0byte", "x" * 300):
        with pytest.raises(
            OutputError, match=r"^got .+ for .+, expected to write a file there: name a folder"
        ) as error:
            write_text(tmp_path / name, "x")
        assert "\n" not in str(error.value)
    assert names(tmp_path) == {"file", "a", "b"}


def test_a_long_name_needs_no_longer_one(tmp_path: Path) -> None:
    for name in ("x" * 255, "\N{SNOWMAN}" * 85):
        write_text(tmp_path / name, name)
        assert (tmp_path / name).read_text() == name


def test_the_mode_is_what_the_umask_leaves_or_private(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        write_bytes(tmp_path / "shared", b"")
        with replacing(tmp_path / "private", PRIVATE) as fd:
            put(fd, b"")
    finally:
        os.umask(before)
    assert [stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("shared", "private")] == [0o640, 0o600]


def test_several_writers_of_one_name_do_not_meet(tmp_path: Path) -> None:
    errors: list[Exception] = []

    def write(text: str) -> None:
        try:
            for _ in range(10):
                write_text(tmp_path / "file", text)
        except Exception as error:
            errors.append(error)

    writers = [threading.Thread(target=write, args=(str(i) * 10_000,)) for i in range(8)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    text = (tmp_path / "file").read_text()
    assert not errors and len(text) == 10_000 and len(set(text)) == 1 and names(tmp_path) == {"file"}


def test_what_looks_like_a_left_over_and_is_no_file_stays(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / ".file.1.0123abcd.tmp")
    write_text(tmp_path / "file", "x")
    assert names(tmp_path) == {"file", ".file.1.0123abcd.tmp"}


def test_a_target_names_the_file_that_would_be_written(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("new")
    assert target(tmp_path / "link") == target(tmp_path / "new") == (tmp_path / "new").resolve()


def test_a_file_can_be_tried_out_before_the_work(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("old")
    for name in ("file", "new"):
        try_out(tmp_path / name)
    try_out(tmp_path / "a/folder/that/is/not/there", makes_folder=True)
    assert names(tmp_path) == {"file"} and (tmp_path / "file").read_text() == "old"
    (tmp_path / "loop").symlink_to("loop")
    for name, why in {
        "loop/below": "Too many levels of symbolic links",
        "n" * 300: "File name too long",
        "file/below": "Not a directory",
        ".": "which is a folder",
        "file/below/it": "Not a directory",
        "no/such/folder": "No such file or directory",
    }.items():
        for makes_folder in (False, name != "no/such/folder"):
            with pytest.raises(OutputError, match=why):
                try_out(tmp_path / name, makes_folder=makes_folder)
    with pytest.raises(OutputError, match=r"got .*, expected to write a file there"):
        try_out(Path("/proc/nothing/here"), makes_folder=True)


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path: Path) -> None:
    make_folder(tmp_path / "a" / "b")
    make_folder(tmp_path / "a" / "b")
    (tmp_path / "file").touch()
    for path in (tmp_path / "file", tmp_path / "file" / "b"):
        with pytest.raises(OutputError, match=f"for {path}, expected to write a file there"):
            make_folder(path)
