"""Files from outside: each ends, is text in a named encoding, and holds JSON that can be used and written again."""

import json
import logging
import os
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from attnpred.errors import ConfigError, PredictorError
from attnpred.reading import DEPTH, parse_json, read_bytes, read_json, read_text, same_file

PROSE = "Café, naïve, 12 €: a text.\nIts second line.\n"
ENCODED = {
    "utf-8": (PROSE.encode(), PROSE, ""),
    "utf-8 with a mark": (b"\xef\xbb\xbf" + PROSE.encode(), PROSE, ""),
    "utf-16 little": (b"\xff\xfe" + PROSE.encode("utf-16-le"), PROSE, "UTF-16"),
    "utf-16 big": (b"\xfe\xff" + PROSE.encode("utf-16-be"), PROSE, "UTF-16"),
    "utf-16 without a mark": ("plain words\n".encode("utf-16-le"), "plain words\n", "UTF-16"),
    "utf-16 big, without a mark": ("plain words\n".encode("utf-16-be"), "plain words\n", "UTF-16"),
    "latin-1": ("Café, naïve\n".encode("latin-1"), "Café, naïve\n", "Latin-1"),
    "cut in a letter": ("Café, naïve".encode()[:-3], "Café, na\ufffd", "1 damaged places"),
    "line ends of Windows": (b"one\r\ntwo\r\n", "one\ntwo\n", ""),
}


@pytest.mark.parametrize(("data", "text", "said"), ENCODED.values(), ids=ENCODED)
def test_the_encoding_is_recognised_and_named(
    data: bytes, text: str, said: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "text.txt"
    path.write_bytes(data)
    with caplog.at_level(logging.WARNING, "attnpred"):
        assert read_text(path) == text
    assert [said in record.getMessage() for record in caplog.records] == ([True] if said else [])


@settings(max_examples=40, deadline=None)
@given(st.text(st.characters(codec="utf-8", exclude_characters="\r\ufeff\0")))
def test_utf8_comes_back_as_it_is(text: str) -> None:
    with tempfile.NamedTemporaryFile() as file:
        Path(file.name).write_bytes(text.encode())
        assert read_text(Path(file.name)) == text


BINARY = {"no text": bytes(range(256)), "half a letter of UTF-16": b"\xff\xfe\x00\xd8a\x00", "zeros": b"\0" * 64}


@pytest.mark.parametrize("data", BINARY.values(), ids=BINARY)
def test_what_is_no_text_is_refused(data: bytes, tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(data)
    with pytest.raises(ConfigError, match=r"got .*/a, which is no .*expected a text file"):
        read_text(tmp_path / "a")


def test_what_may_never_end_is_refused_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (Path("/dev/zero"), Path("/dev/null"), tmp_path / "pipe"):
        with pytest.raises(PredictorError, match=f"got {path}, which is no regular file, expected x"):
            read_bytes(path, "x", 10, PredictorError)


def test_what_is_too_long_is_refused_unread(tmp_path: Path) -> None:
    with (tmp_path / "holes").open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(ConfigError, match=r"holes of more than 1,000 bytes, expected x that is smaller"):
        read_bytes(tmp_path / "holes", "x", 1000)


@pytest.mark.parametrize(
    ("name", "reason"), [("none", "No such file"), ("", "Is a directory"), ("a" * 300, "too long")]
)
def test_what_cannot_be_read_is_one_line(name: str, reason: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=rf"\(.*{reason}.*\), expected a text file"):
        read_text(tmp_path / name)


WRONG = {
    "deep": ("[" * 100_000, "more than 64 levels"),
    "just too deep": ("[" * (DEPTH + 1) + "]" * (DEPTH + 1), "more than 64 levels"),
    "400 digits": ("[1" + "0" * 400 + "]", "10000000000000000000 is no finite number of at most 64 bits"),
    "5000 digits": ("9" * 5000, "is no finite number"),
    "beyond 64 bits": (str(1 << 64), "18446744073709551616 is no finite number"),
    "beyond a float": ("-1e999", "-1e999 is no finite number"),
    "NaN": ('{"a": NaN}', "NaN is no finite number"),
    "infinity": ("[-Infinity]", "-Infinity is no finite number"),
    "half a letter": (r'["\ud800"]', r"half of a letter, \\ud800, in a text"),
    "half a letter in a key": (r'{"a": {"\uDFFF": 1}}', r"half of a letter, \\udfff, in a text"),
    "no JSON": ("{a}", "that is not JSON"),
    "nothing": ("", "that is not JSON"),
}


@pytest.mark.parametrize(("text", "reason"), WRONG.values(), ids=WRONG)
def test_json_that_cannot_be_used_is_one_line(text: str, reason: str) -> None:
    with pytest.raises(ConfigError, match=rf"^got here .*{reason}"):
        parse_json(text, "here", "one object")


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(1 << 63), (1 << 64) - 1) | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(codec="utf-8")),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(st.characters(codec="utf-8")), inner),
)  # fmt: skip


@settings(max_examples=40, deadline=None)
@given(VALUES)
def test_json_that_can_be_written_comes_back(value: Any) -> None:
    assert parse_json(json.dumps(value), "here", "x") == value


def test_a_file_of_json_may_have_a_mark(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_bytes(b'\xef\xbb\xbf{"a": "\\ud83d\\ude00"}')
    assert read_json(tmp_path / "a.json", "x") == {"a": "😀"}


def test_two_names_of_one_file(tmp_path: Path) -> None:
    one, other, loop = tmp_path / "one", tmp_path / "other", tmp_path / "loop"
    one.touch()
    other.hardlink_to(one)
    loop.symlink_to(loop)
    assert same_file(one, other)
    assert not same_file(one, loop) and not same_file(one, tmp_path / "none")
