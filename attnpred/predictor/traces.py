"""Traces: captured attention on disk, from which a predictor is trained.

A folder holds `traces.json` (`TraceMeta`) and one file per document, `doc-<slug>.safetensors`, with
`rows` float16 [layers, Hs, T, N]: for T consecutive query positions the block maxima of the attention probabilities
(also the maximum over the heads of a group), zero where a block did not exist yet. Beside them are what they came from,
`queries` float16 [layers, Hq, T, D] and `keys` float16 [layers, Hkv, L, D], positions already rotated in: digests are
trained on these, and any other block size can be measured with them. Metadata: `name`, and `first`, the position in
tokens of the first query. A query at position p has seen p + 1 tokens. (Folders without queries and keys train the CNN.)

A document's file appears complete or not at all, so an interrupted capture goes on where it stopped. The reader takes
one document, or one layer of it, from disk at a time.
"""

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from attnpred.errors import TraceError
from attnpred.files import make_folder, write_bytes, write_text
from attnpred.predictor.trace_format import META, TraceMeta, file_name, opened, read_meta
from attnpred.shapes import num_blocks

__all__ = ["Trace", "TraceMeta", "TraceReader", "TraceSize", "TraceWriter", "Vectors", "split"]


@dataclass(frozen=True, slots=True)
class Trace:
    """One document: `rows` float16 [layers, Hs, T, N] ([Hs, T, N] of one layer), and the first query's position."""

    rows: Tensor
    first: int


@dataclass(frozen=True, slots=True)
class Vectors:
    """One document: float16 `queries` [layers, Hq, T, D], `keys` [layers, Hkv, L, D], and the first query's position."""

    queries: Tensor
    keys: Tensor
    first: int


@dataclass(frozen=True, slots=True)
class TraceSize:
    """T, N and the first query's position of a document, read without its rows."""

    rows: int
    blocks: int
    first: int


class TraceWriter:
    """Writes documents into `folder` (made if missing); a folder begun with another `meta` is a `TraceError`."""

    def __init__(self, folder: str | Path, meta: TraceMeta) -> None:
        self.folder, self.meta = Path(folder), meta
        make_folder(self.folder)
        if not (self.folder / META).exists():
            write_text(self.folder / META, json.dumps(dataclasses.asdict(meta), indent=2, ensure_ascii=False) + "\n")
            return
        found = read_meta(self.folder)
        for field in dataclasses.fields(meta):
            got, expected = getattr(found, field.name), getattr(meta, field.name)
            if got != expected and field.name != "created_by":  # a newer program may go on
                raise TraceError(f"got {folder} with {field.name}={got!r}, expected {expected!r}: use another folder")

    def has(self, name: str) -> bool:
        """Return whether document `name` is written."""
        return (self.folder / file_name(name)).exists()

    def add(
        self, name: str, rows: Tensor, first: int, queries: Tensor | None = None, keys: Tensor | None = None
    ) -> None:
        """Write document `name`, replacing an earlier one; tensors as in the module's docstring, `first` >= 0."""
        meta = self.meta
        rows = rows.detach().to("cpu", torch.float16).contiguous()
        if rows.ndim != 4 or tuple(rows.shape[:2]) != (meta.layers, meta.heads) or not 1 <= rows.shape[2] <= meta.rows:
            raise TraceError(
                f"got rows of shape {tuple(rows.shape)} for {name!r}, "
                f"expected [{meta.layers}, {meta.heads}, 1 to {meta.rows}, blocks]: capture with these sizes"
            )
        if first < 0 or rows.shape[3] < num_blocks(first + rows.shape[2], meta.block_size):
            raise TraceError(
                f"got {rows.shape[3]} blocks for {rows.shape[2]} queries from position {first}, expected every block of "
                f"{meta.block_size} tokens up to the last query"
            )
        self._check_values(name, rows, first)
        tensors = {"rows": rows} | self._vectors(name, rows, first, queries, keys)
        write_bytes(self.folder / file_name(name), save(tensors, metadata={"name": name, "first": str(first)}))

    def _vectors(
        self, name: str, rows: Tensor, first: int, queries: Tensor | None, keys: Tensor | None
    ) -> dict[str, Tensor]:
        if queries is None and keys is None:
            return {}
        if queries is None or keys is None:
            raise TraceError(f"got one of queries and keys of {name!r}, expected both or none: capture again")
        meta, steps = self.meta, rows.shape[2]
        wanted = {
            "queries": (queries, (meta.layers, meta.query_heads, steps, meta.head_dim)),
            "keys": (keys, (meta.layers, meta.heads, first + steps, meta.head_dim)),
        }
        result = {}
        for what, (tensor, shape) in wanted.items():
            half = tensor.detach().to("cpu", torch.float16).contiguous()
            if tuple(half.shape) != shape or not bool(half.isfinite().all()):
                raise TraceError(
                    f"got {what} of {name!r} of shape {tuple(half.shape)}, expected finite {list(shape)}: capture again"
                )
            result[what] = half
        return result

    def _check_values(self, name: str, rows: Tensor, first: int) -> None:
        if not (rows.min() >= 0 and rows.max() <= 1):  # false for NaN too
            span = f"{rows.min():g} to {rows.max():g}"
            raise TraceError(f"got rows of {name!r} from {span}, expected probabilities: capture after the softmax")
        # a mistake of one row or one block would train without complaint, so look right of each query's own block
        start = num_blocks(first + 1, self.meta.block_size)
        last_block = torch.arange(first, first + rows.shape[2], device="cpu") // self.meta.block_size
        later = torch.arange(start, rows.shape[3], device="cpu")[None] > last_block[:, None]  # [T, N - start]
        if bool((rows[..., start:] * later).any()):
            raise TraceError(
                f"got {name!r} with attention after its query, expected zeros: check first={first} and mask"
            )


class TraceReader:
    """Reads a folder of traces: `meta`, `documents` (sorted names), and one document at a time."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise TraceError(f"got no folder {str(folder)!r}, expected traces: write some with `attnpred capture`")
        self.meta = read_meta(self.folder)
        self._files: dict[str, Path] = {}
        for path in sorted(self.folder.glob("doc-*.safetensors")):
            with opened(path) as file:
                self._files[(file.metadata() or {}).get("name", path.name)] = path
        self.documents = sorted(self._files)

    def size(self, name: str) -> TraceSize:
        """Return the size of document `name`; reads the head of its file."""
        with opened(self._path(name)) as file:
            shape, first = self._check(name, file)
        return TraceSize(shape[2], shape[3], first)

    def load(self, name: str, layer: int | None = None) -> Trace:
        """Return document `name`, or one `layer` of it, reading nothing else."""
        with opened(self._path(name)) as file:
            _, first = self._check(name, file, layer)
            rows: Tensor = file.get_tensor("rows") if layer is None else file.get_slice("rows")[layer]
        return Trace(rows, first)

    def vectors(self, name: str, layer: int | None = None) -> Vectors:
        """Return queries and keys of document `name`; with `layer`, of that layer alone, the first size being 1."""
        with opened(self._path(name)) as file:
            shape, first = self._check(name, file, layer)
            meta, found = self.meta, {}
            for what, wanted in (
                ("queries", [meta.layers, meta.query_heads, shape[2], meta.head_dim]),
                ("keys", [meta.layers, meta.heads, first + shape[2], meta.head_dim]),
            ):
                present = what in file.keys()  # noqa: SIM118 (safe_open is no mapping)
                got = list(file.get_slice(what).get_shape()) if present else "nothing"
                if got != wanted:
                    raise TraceError(
                        f"got {self._files[name]} with {what} {got}, expected {wanted}: capture it again with this version"
                    )
                found[what] = file.get_tensor(what) if layer is None else file.get_slice(what)[layer : layer + 1]
        return Vectors(found["queries"], found["keys"], first)

    def _path(self, name: str) -> Path:
        if name not in self._files:
            raise TraceError(
                f"got no document {name!r} in {self.folder}, expected one of its {len(self._files)} documents"
            )
        return self._files[name]

    def _check(self, name: str, file: Any, layer: int | None = None) -> tuple[list[int], int]:
        meta, facts = self.meta, file.metadata() or {}
        if layer is not None and not 0 <= layer < meta.layers:
            raise TraceError(f"got layer {layer}, expected 0 to {meta.layers - 1}")
        spec = file.get_slice("rows") if "rows" in file.keys() else None  # noqa: SIM118 (safe_open is no mapping)
        shape = [] if spec is None else list(spec.get_shape())
        good = (
            spec is not None
            and len(shape) == 4
            and spec.get_dtype() == "F16"
            and shape[:2] == [meta.layers, meta.heads]
        )
        if not good or not facts.get("first", "").isdecimal():
            raise TraceError(
                f"got {self._files[name]} with rows {shape} and first={facts.get('first')!r}, expected float16 "
                f"[{meta.layers}, {meta.heads}, T, N] and a position: delete the file and capture it again"
            )
        return shape, int(facts["first"])


def split(documents: Sequence[str], validation: float, seed: int) -> tuple[list[str], list[str]]:
    """Return the names to train on and the names to validate on, about a share `validation` of them.

    Each name is drawn by its own hash, so a document keeps its side when others are added; steps of one document are
    never on both sides. Only when a side would be empty, the nearest name is moved there.
    """
    if not 0 < validation < 1:
        raise TraceError(f"got validation={validation}, expected a share between 0 and 1")
    if len(set(documents)) < 2:
        raise TraceError(
            f"got {len(set(documents))} usable documents, expected 2 or more, one to validate on: capture more"
        )
    draws = {name: int(hashlib.sha256(f"{seed}:{name}".encode()).hexdigest()[:13], 16) / 16**13 for name in documents}
    ordered = sorted(draws, key=lambda name: (draws[name], name))
    held_out = sum(draw < validation for draw in draws.values())
    held_out = min(max(held_out, 1), len(ordered) - 1)
    return sorted(ordered[held_out:]), sorted(ordered[:held_out])
