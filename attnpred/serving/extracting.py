"""The text of a file that was handed in: plain text, Markdown as it is, or the text of a PDF (pypdf)."""

import io
from collections.abc import Callable

from attnpred.errors import ConfigError, missing_extra

PAGES = 5000
"""The most of a PDF."""


def text_of(data: bytes, kind: str, most: int) -> str:
    """Return the text in `data`, of at most `most` letters; kind: its media type. Raises `ConfigError`."""
    reader = READERS.get(kind.partition(";")[0].strip().lower())
    if reader is None:
        raise ConfigError(f"got a document of type {kind[:60]!r}, expected one of {', '.join(READERS)}")
    text = reader(data, most).replace("\r\n", "\n").replace("\0", "").strip()
    if not text:
        raise ConfigError("got a document without text, expected some (a PDF of pictures has none)")
    if len(text) > most:
        raise ConfigError(f"got a document of {len(text):,} letters, expected at most {most:,}")
    return text


def _plain(data: bytes, most: int) -> str:
    for encoding in ("utf-8-sig", *(("utf-16",) if data[:2] in (b"\xff\xfe", b"\xfe\xff") else ())):
        try:
            return data.decode(encoding)
        except UnicodeDecodeError:
            continue
    raise ConfigError("got a document that is no UTF-8 text, expected it: save it as UTF-8")


def _pdf(data: bytes, most: int) -> str:
    try:
        from pypdf import PdfReader
        from pypdf.errors import PyPdfError
    except ImportError:
        raise missing_extra("pypdf", "serve") from None
    parts, size = [], 0
    try:
        for number, page in enumerate(PdfReader(io.BytesIO(data)).pages):
            parts.append(page.extract_text())
            size += len(parts[-1])
            if size > most or number >= PAGES:
                raise ConfigError(f"got a PDF of more than {most:,} letters or {PAGES:,} pages, expected a shorter one")
    except ConfigError:
        raise
    except (PyPdfError, ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError) as error:
        raise ConfigError(f"got a PDF that cannot be read ({type(error).__name__}), expected a whole one") from None
    return "\n\n".join(parts)


READERS: dict[str, Callable[[bytes, int], str]] = {
    "text/plain": _plain,
    "text/markdown": _plain,
    "application/pdf": _pdf,
}
