"""The files of a folder of traces: `TraceMeta`, the name of a document's file, opening one. See `traces.py`."""

import dataclasses
import hashlib
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from attnpred.errors import TraceError
from attnpred.reading import read_json, require_regular

META = "traces.json"
FORMAT = 2


@dataclass(frozen=True, slots=True)
class TraceMeta:
    """What all documents of a folder share.

    base_model, fingerprint: the captured model, as in `PredictorConfig`. block_size: P. layers, heads: the first sizes
    of `rows` (heads is Hkv). rows: T of a document, at most (a short text gives fewer). query_heads, head_dim: Hq and D.
    layer_ids: the model's layers that were captured, as in "0 1 2". scale: of the logits. created_by: for people only.
    """

    base_model: str
    fingerprint: str
    block_size: int
    layers: int
    heads: int
    rows: int
    created_by: str = ""
    query_heads: int = 1
    head_dim: int = 1
    layer_ids: str = ""
    scale: float = 1.0
    format: int = FORMAT

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if type(value) is not field.type or (field.type is int and value < 1):
                name = "a whole number of at least 1" if field.type is int else "a text"
                raise TraceError(f"got {field.name}={value!r}, expected {name}: capture the traces again")
        if self.format != FORMAT:
            raise TraceError(
                f"got format={self.format}, expected {FORMAT}: update attnpred, or capture the traces again"
            )


def file_name(name: str) -> str:
    if not name:
        raise TraceError("got an empty document name, expected a text: name the document after its file")
    slug = re.sub(r"[^a-z0-9_-]+", "-", name.lower())[:60]
    if slug != name:  # two names must not share a file, not even where file names ignore case
        slug += "-" + hashlib.sha256(name.encode()).hexdigest()[:12]
    return f"doc-{slug}.safetensors"


def read_meta(folder: Path) -> TraceMeta:
    path = folder / META
    if not path.exists():
        raise TraceError(f"got no {META} in {str(folder)!r}, expected traces: write some with `attnpred capture`")
    values = read_json(path, "one object: capture again", TraceError)
    known = [field.name for field in dataclasses.fields(TraceMeta)]
    if not isinstance(values, dict) or set(values) != set(known):
        got = sorted(values) if isinstance(values, dict) else type(values).__name__
        raise TraceError(f"got {path} with {got}, expected the keys {known}: update attnpred, or capture again")
    return TraceMeta(**values)


@contextmanager
def opened(path: Path) -> Iterator[Any]:
    require_regular(path, "safetensors: delete and capture it again", TraceError)
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise TraceError(f"got a damaged {path} ({error}), expected safetensors: delete and capture it again") from None
