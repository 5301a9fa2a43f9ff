"""GGUF files, converted once to a folder that transformers loads like any other.

Unpacking the blocks of a GGUF file takes half a minute for a small model; the folder then loads in a second. It is keyed by
the content of the file, so a file that moves is not converted again, and one that changes is.

The folder is in bf16 where the file holds blocks, else in the numbers of the file: half the disk of fp32, and a GPU, or a
CPU that multiplies bf16, loads it as it is. It rounds what is rounded far more in the blocks: next to llama.cpp on the same
file nobody can tell (`tools/llama_logits.py`). transformers can also leave the blocks packed; it has kernels for that, which
are native code from the Hub, on some GPUs and on no CPU, so this is not done here.
"""

import hashlib
import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig

from attnpred.errors import StoreError, UnsupportedModelError, missing_extra
from attnpred.hf.config_border import check_values
from attnpred.hf.named_models import folder_of
from attnpred.hf.once import once, say

MAGIC = b"GGUF"
SIZES = {
    "block_count": "num_hidden_layers",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "embedding_length": "hidden_size",
    "context_length": "max_position_embeddings",
}
"""Fields of the header behind the architecture's name, and what transformers calls them."""


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
    # Older versions always unpack the blocks, and have no such configuration.
    packing = getattr(transformers, "GgufConfig", None)
    how = {"quantization_config": packing(dequantize=True)} if packing else {}
    with _readable(path):
        dtype = _checked_dtype(path)
        tokenizer = AutoTokenizer.from_pretrained(**given)
        model: Any = AutoModelForCausalLM.from_pretrained(**given, **how, dtype=dtype)
    if _state(path) != before:
        raise UnsupportedModelError(f"got {path} changed while it was converted, expected it at rest: try again")
    vars(model.config).pop("quantization_config", None)
    try:
        model.save_pretrained(made)
        tokenizer.save_pretrained(made)
    except SafetensorError as error:
        raise StoreError(f"got {error} while {made.parent} was written, expected room for the model") from error
    return made


def config_of(path: Path) -> PreTrainedConfig:
    """Return the config in the header of a GGUF file, without its weights; raises as `converted`."""
    digest = _digest(path)
    if folder_of(digest).exists():
        found: PreTrainedConfig = AutoConfig.from_pretrained(str(folder_of(digest)))
        return found
    need_extra()
    with _readable(path):
        dtype = _checked_dtype(path)
        found = AutoConfig.from_pretrained(**gguf_arguments(path))
        found.dtype = dtype
    return found


def _checked_dtype(path: Path) -> torch.dtype:
    """Return in which numbers the file is unpacked. Raises `UnsupportedModelError` for sizes that no model has."""
    from gguf import GGMLQuantizationType, GGUFReader

    reader = GGUFReader(path)
    for name, field in reader.fields.items():
        ours = SIZES.get(name.partition(".")[2])
        if ours is not None:
            check_values({ours: field.contents()}, path)
    plain = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
    kinds = {GGMLQuantizationType(tensor.tensor_type).name for tensor in reader.tensors}
    halves = kinds - {"F32"}  # beside which norms are in 32 bits
    return plain[halves.pop() if halves else "F32"] if kinds <= plain.keys() and len(halves) < 2 else torch.bfloat16


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    """Raise `UnsupportedModelError` for whatever a reader of binary files makes of one that is not as it expects."""
    try:
        yield
    except UnsupportedModelError:
        raise
    except Exception as error:
        first = next(iter(str(error).strip().splitlines()), "")
        raise UnsupportedModelError(
            f"got {path}, expected a whole GGUF file that transformers {transformers.__version__} reads: copy it again if it "
            f"was cut off, else it is of a kind that is not known here ({type(error).__name__}: {first})"
        ) from error


def _state(path: Path) -> tuple[int, int]:
    found = path.stat()
    return found.st_size, found.st_mtime_ns
