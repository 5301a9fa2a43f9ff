"""`Documents`: texts that were handed in, kept in a folder of their owner's until they are deleted.

Whoever has another key sees none of them: the folder is named by a hash of the key. A document's name is what people call
it and is never part of a path; its id is drawn here, and an id that was not is refused before anything is looked for. Each
is one file of JSON, whole or not there. What the model has read of it is no part of it: those are blocks like any others.
"""

import json
import re
import secrets
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, final

from attnpred.errors import AttnpredError, ConfigError
from attnpred.files import PRIVATE, put, replacing
from attnpred.folders import make_private
from attnpred.reading import JSON_BYTES, read_json

_ID = re.compile(r"doc-[0-9a-f]{24}")
_FIELDS = {"id": str, "name": str, "text": str, "created": int, "tokens": int}


class MissingError(AttnpredError):
    """There is no document of that id for this key."""


@final
@dataclass(frozen=True, slots=True)
class Document:
    """tokens: of its text. created: seconds of the epoch."""

    id: str
    name: str
    text: str
    created: int
    tokens: int


@final
class Documents:
    """folder: None keeps them in memory alone. most: documents of one owner; most_bytes: of all their texts.

    Any thread may use it.
    """

    def __init__(self, folder: Path | None, most: int, most_bytes: int) -> None:
        self.folder, self.most, self.most_bytes = folder, most, most_bytes
        self._known: dict[str, dict[str, Document]] = {}
        self._lock = threading.Lock()

    def add(self, owner: str, name: str, text: str, tokens: int) -> Document:
        """Keep a text. Raises `ConfigError` where the owner has too many, and `OutputError`."""
        with self._lock:
            mine = self._of(owner)
            if len(mine) >= self.most:
                raise ConfigError(f"got a document more than {self.most}, expected fewer: delete some first")
            size = len(text.encode()) + sum(len(one.text.encode()) for one in mine.values())
            if size > self.most_bytes:
                raise ConfigError(
                    f"got {size:,} bytes of documents, expected at most {self.most_bytes:,}: delete some first"
                )
            made = Document(f"doc-{secrets.token_hex(12)}", name, text, int(time.time()), tokens)
            if self.folder is not None:
                make_private(self.folder / owner)
                with replacing(self._path(owner, made.id), PRIVATE) as fd:
                    put(fd, json.dumps(asdict(made)).encode())
            mine[made.id] = made
        return made

    def get(self, owner: str, name: str) -> Document:
        """Return the document of that id. Raises `MissingError`."""
        with self._lock:
            found = self._of(owner).get(name) if _ID.fullmatch(name) else None
        if found is None:
            raise MissingError(f"got document {name[:40]!r}, which is not there, expected one of GET /v1/documents")
        return found

    def list(self, owner: str) -> list[Document]:
        """Return all of an owner's, the newest first."""
        with self._lock:
            found = list(self._of(owner).values())
        return sorted(found, key=lambda one: (-one.created, one.id))

    def delete(self, owner: str, name: str) -> Document:
        """Forget a document. Raises `MissingError`."""
        found = self.get(owner, name)
        with self._lock:
            if self.folder is not None:
                self._path(owner, found.id).unlink(missing_ok=True)
            self._of(owner).pop(found.id, None)
        return found

    def _path(self, owner: str, name: str) -> Path:
        return (self.folder or Path()) / owner / f"{name}.json"

    def _of(self, owner: str) -> dict[str, Document]:
        """Return what is there of an owner; the folder is read once."""
        if owner not in self._known:
            self._known[owner] = {}
            if self.folder is not None and (self.folder / owner).is_dir():
                for path in sorted((self.folder / owner).glob("doc-*.json")):
                    found = _read(path)
                    if found is not None:
                        self._known[owner][found.id] = found
        return self._known[owner]


def _read(path: Path) -> Document | None:
    """Return the document in a file; None for one that nobody here has written."""
    try:
        found: Any = read_json(path, "a document as it was written")
    except AttnpredError:
        return None
    is_one = type(found) is dict and found.keys() == _FIELDS.keys()
    if not is_one or any(type(found[name]) is not kind for name, kind in _FIELDS.items()) or found["id"] != path.stem:
        return None
    return Document(**found)


LONGEST = JSON_BYTES // 8
"""Letters of a document: its file is JSON, in which a letter may take six bytes."""
