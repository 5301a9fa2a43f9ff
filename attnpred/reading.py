"""The one way to read a file from outside: it ends, it is text, its JSON can be trusted to be plain.

A file is read if it is a regular one of at most the stated size: a device or a pipe may never end, and what is too long is
refused before it fills the memory. Text is UTF-8; UTF-16 and Latin-1 are recognised, and the log names what was read so.
JSON has finite numbers of at most 64 bits, at most `DEPTH` levels, and texts that can be written again. Errors are of the
class that the caller names, one line each.
"""

import json
import logging
import os
import re
import stat
from pathlib import Path
from typing import Any

from attnpred.checks import is_finite
from attnpred.errors import AttnpredError, ConfigError

TEXT_BYTES, ROWS_BYTES, JSON_BYTES = 1 << 28, 1 << 30, 1 << 26
"""The longest files that are read: texts, files of rows, files that are one JSON object."""
DEPTH, DIGITS = 64, 20
"""Levels of JSON, and digits of its whole numbers."""

_MARKS = ((b"\xef\xbb\xbf", "utf-8"), (b"\xff\xfe", "utf-16-le"), (b"\xfe\xff", "utf-16-be"))
_HALF = re.compile("[\ud800-\udfff]")
"""Half of a letter beyond 16 bits: JSON can spell it, and no encoding can write it."""

logger = logging.getLogger("attnpred")


def can_be_written(text: str) -> bool:
    """Return whether every letter of `text` is a whole one."""
    return not _HALF.search(text)


def same_file(one: Path, other: Path) -> bool:
    """Return whether both are names of one file that exists."""
    try:
        return one.samefile(other)
    except OSError:
        return False


def read_bytes(path: Path, expected: str, most: int, error: type[AttnpredError] = ConfigError) -> bytes:
    """Return what is in a regular file of at most `most` bytes."""
    try:
        with open(path, "rb", opener=_without_waiting) as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise error(f"got {path}, which is no regular file, expected {expected}")
            data = file.read(most + 1) if os.fstat(file.fileno()).st_size <= most else None
    except OSError as failure:
        raise error(f"got {path} ({failure.strerror}), expected {expected}") from None
    if data is None or len(data) > most:
        raise error(f"got {path} of more than {most:,} bytes, expected {expected} that is smaller")
    return data


def require_regular(path: Path, expected: str, error: type[AttnpredError] = ConfigError) -> None:
    """Raise `error` unless `path` is a regular file: for libraries that open it themselves, and would wait for a pipe."""
    try:
        if stat.S_ISREG(path.stat().st_mode):
            return
        why = "no regular file"
    except OSError as failure:
        why = str(failure.strerror)
    raise error(f"got {path} ({why}), expected {expected}")


def _without_waiting(name: str, flags: int) -> int:
    return os.open(name, flags | getattr(os, "O_NONBLOCK", 0))  # a pipe without a writer; Windows has neither


def read_text(
    path: Path, expected: str = "a text file", most: int = TEXT_BYTES, error: type[AttnpredError] = ConfigError
) -> str:
    """Return the text of a file, without its byte order mark, line ends as newlines."""
    data = read_bytes(path, expected, most, error)
    return _text(data, path, expected, error).replace("\r\n", "\n")


def _text(data: bytes, path: Path, expected: str, error: type[AttnpredError]) -> str:
    for mark, encoding in _MARKS:
        if data.startswith(mark):
            return _decoded(data[len(mark) :], encoding, path, expected, error)
    if b"\0" in data:
        encoding = "utf-16-le" if data[1::2].count(0) > data[::2].count(0) else "utf-16-be"
        zeros = max(data[1::2].count(0), data[::2].count(0))
        if 4 * zeros < len(data) or data.count(0) > zeros:  # of Latin letters, every second byte is zero, and no other
            raise error(f"got {path}, which is no text: it holds zero bytes; expected {expected}")
        return _decoded(data, encoding, path, expected, error)
    return _without_marks(data, path)


def _decoded(data: bytes, encoding: str, path: Path, expected: str, error: type[AttnpredError]) -> str:
    """Return text in the encoding that its first bytes tell."""
    if encoding == "utf-8":
        return _without_marks(data, path)
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError as failure:
        raise error(f"got {path}, which is no UTF-16 from byte {failure.start} on, expected {expected}") from None
    logger.warning("%s is read as UTF-16 text", path)
    return text


def _without_marks(data: bytes, path: Path) -> str:
    """Return text that is UTF-8, but for a few damaged places, or else Latin-1."""
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        text = data.decode("utf-8", errors="replace")
    damaged, beyond = text.count("\ufffd"), len(re.findall("[^\x00-\x7f]", text))
    if 2 * damaged > beyond:
        logger.warning("%s is read as Latin-1 text: it is no UTF-8", path)
        return data.decode("latin-1")
    logger.warning("%s is UTF-8 text with %d damaged places, which are replaced", path, damaged)
    return text


def read_json(path: Path, expected: str, error: type[AttnpredError] = ConfigError) -> Any:
    """Return what a file of one JSON value holds."""
    return parse_json(read_text(path, expected, JSON_BYTES, error), path, expected, error)


def parse_json(text: str, where: object, expected: str, error: type[AttnpredError] = ConfigError) -> Any:
    """Return the value that `text` spells; `where` is named in errors."""
    try:
        found = json.loads(text, parse_int=_number, parse_float=_number, parse_constant=_number)
        if text.count("{") + text.count("[") > DEPTH or re.search(r"\\u[dD]", text):
            _walk(found)
    except RecursionError:
        raise error(f"got {where} with more than {DEPTH} levels of JSON, expected {expected}") from None
    except ValueError as failure:
        raise error(f"got {where} that is not JSON, expected {expected} ({failure})") from None
    return found


def _number(text: str) -> int | float:
    """Return a number as JSON spells it; the names of what is none (NaN) come here too."""
    is_whole = text.lstrip("-").isdigit()
    if not is_whole or len(text) <= DIGITS:
        value = int(text) if is_whole else float(text)
        if is_finite(value):
            return value
    raise ValueError(f"{text[:DIGITS]} is no finite number of at most 64 bits")


def _walk(found: Any) -> None:
    """Raise `RecursionError` for more than `DEPTH` levels, `ValueError` for a text that cannot be written."""
    level = [found]
    for _ in range(DEPTH + 1):
        for value in level:
            if type(value) is str and (half := _HALF.search(value)):
                raise ValueError(f"half of a letter, \\u{ord(half[0]):x}, in a text")
        holders = [value for value in level if type(value) in (dict, list)]
        if not holders:
            return
        level = [part for one in holders for part in ([*one, *one.values()] if type(one) is dict else one)]
    raise RecursionError
