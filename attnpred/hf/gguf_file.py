"""GGUF files, converted once to a folder that transformers loads like any other.

Unpacking the blocks of a GGUF file takes half a minute for a small model; the folder then loads in a second. It is keyed by
the content of the file, so a file that moves is not converted again, and one that changes is.

The folder is in fp32 where the file holds blocks: a block's numbers are a product and a sum of numbers of 16 bits, which
bf16 would round; a file of plain numbers keeps theirs. So the folder takes the memory and the disk of a plain model:
transformers has kernels that compute with packed blocks, but for no CPU.
"""

import hashlib
import importlib.util
from pathlib import Path
from typing import Any

import transformers
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer

from attnpred.errors import StoreError, UnsupportedModelError, missing_extra
from attnpred.hf.named_models import models_folder
from attnpred.hf.once import once, say

FOLDER = "from-gguf-1"
"""Changes when the same file would be converted to something else."""

MAGIC = b"GGUF"


def is_gguf(name: str) -> bool:
    """Return whether `name` is the path of a GGUF file, there or not."""
    return name.lower().endswith(".gguf")


def need_extra() -> None:
    """Raise `MissingExtraError` unless the extra `gguf` is installed."""
    for package in ("gguf", "accelerate"):
        if importlib.util.find_spec(package) is None:
            raise missing_extra(package, "gguf")


def converted(path: Path, digest: str | None = None) -> Path:
    """Return the folder of the GGUF file `path`, converted if it is not here. digest: its SHA-256, if that is known.

    Raises `UnsupportedModelError` for a file that cannot be read, `MissingExtraError`, and `StoreError`.
    """
    if digest is None:
        digest = _digest(path)
    target = folder_of(digest)
    if not target.exists():
        need_extra()
    return once(target, lambda work: _convert(path, work / "model"))


def folder_of(digest: str) -> Path:
    """Return where the conversion of the file with this SHA-256 lies, or would lie."""
    return models_folder() / FOLDER / digest[:32]


def gguf_arguments(path: Path) -> dict[str, Any]:
    """Return what `from_pretrained` is given for this file."""
    return {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}


def _digest(path: Path) -> str:
    try:
        with path.open("rb") as file:
            if not path.is_file() or file.read(len(MAGIC)) != MAGIC:
                raise UnsupportedModelError(f"got {path}, expected a GGUF file: it does not begin like one")
            file.seek(0)
            found = hashlib.sha256()
            while chunk := file.read(1 << 20):
                found.update(chunk)
            return found.hexdigest()
    except OSError as error:
        raise UnsupportedModelError(f"got model {str(path)!r}, expected a GGUF file: {error.strerror}") from None


def _convert(path: Path, made: Path) -> Path:
    say(f"converting {path.name} to safetensors, once")
    before = _state(path)
    given = gguf_arguments(path)
    # Up to transformers 5.20 the blocks are always unpacked, and there is no such configuration.
    packing = getattr(transformers, "GgufConfig", None)
    how = {"quantization_config": packing(dequantize=True)} if packing else {}
    try:
        tokenizer = AutoTokenizer.from_pretrained(**given)
        model: Any = AutoModelForCausalLM.from_pretrained(**given, **how)
    except Exception as error:  # whatever a reader of binary files makes of a file that is not as it expects
        first = next(iter(str(error).strip().splitlines()), "")
        raise UnsupportedModelError(
            f"got {path}, expected a GGUF file that transformers {transformers.__version__} reads: "
            f"{type(error).__name__}: {first}"
        ) from error
    if _state(path) != before:
        raise UnsupportedModelError(f"got {path} changed while it was converted, expected it at rest: try again")
    vars(model.config).pop("quantization_config", None)
    try:
        model.save_pretrained(made)
        tokenizer.save_pretrained(made)
    except SafetensorError as error:
        raise StoreError(f"got {error} while {made.parent} was written, expected room for the model") from error
    return made


def _state(path: Path) -> tuple[int, int]:
    found = path.stat()
    return found.st_size, found.st_mtime_ns
