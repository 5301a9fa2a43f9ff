"""Models and tokenizers by name: a Hub id, a local folder, a GGUF file, or a name of `attnpred models`."""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig, TextStreamer

from attnpred.errors import UnsupportedModelError
from attnpred.hf import named_models
from attnpred.hf.config_border import check_config
from attnpred.hf.fetch import fetch_model
from attnpred.hf.gguf_file import converted, is_gguf
from attnpred.hf.named_models import DEMO_MODEL


def source_of(model: str) -> str:
    """Return what transformers loads for `model`: a folder, or a Hub id as it is.

    A named model is fetched at its first use, unless it has terms to agree to, and a GGUF file converted. Raises
    `FetchError`, `UnsupportedModelError`, `MissingExtraError` and `StoreError`.
    """
    if model == "demo":
        return str(DEMO_MODEL)
    if model in named_models.NAMED_MODELS:
        return str(fetch_model(model))
    if is_gguf(model):
        return str(converted(Path(model).expanduser()))
    return model


def load_model(model: str, *, device: str | None = None, dtype: str | torch.dtype = "auto") -> tuple[Any, Any]:
    """Return (model, tokenizer) for a Hub id, a local folder, a GGUF file, or a name of `attnpred models`.

    device: left out, a GPU if there is one. Raises as `source_of`, and `UnsupportedModelError` for what cannot be loaded.
    """
    source = source_of(model)
    where = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if model == "demo" and where == "cpu":
        dtype = torch.float32
    check_config(source)
    try:
        tokenizer = AutoTokenizer.from_pretrained(source)
        loaded: Any = AutoModelForCausalLM.from_pretrained(source, dtype=dtype)
    except Exception as error:  # files of anyone's making, read by code of every family: it may be any
        raise _no_model(model, error) from error
    return loaded.to(where).eval(), tokenizer


def load_config(model: str) -> tuple[PreTrainedConfig, torch.dtype]:
    """Return (config, dtype) of what `load_model(model)` would load, without its weights."""
    source = source_of(model)
    check_config(source)
    try:
        config: PreTrainedConfig = AutoConfig.from_pretrained(source)
    except Exception as error:  # as above
        raise _no_model(model, error) from error
    text: Any = config.get_text_config(decoder=True)
    dtype: Any = config.dtype or getattr(text, "dtype", None) or torch.float32
    if not isinstance(text, PreTrainedConfig) or not isinstance(dtype, torch.dtype):
        raise _no_model(
            model, TypeError(f"its config has {text if isinstance(dtype, torch.dtype) else dtype!r} inside")
        )
    return config, torch.float32 if model == "demo" and not torch.cuda.is_available() else dtype


def _no_model(model: str, error: Exception) -> UnsupportedModelError:
    first = next(iter(str(error).strip().splitlines()), "") or type(error).__name__
    return UnsupportedModelError(
        f"got model {model!r}, expected a Hub id, a local folder, a GGUF file or a name of `attnpred models`: {first}"
    )


def text_streamer(tokenizer: Any) -> Any:
    """Return a streamer for `generate` that prints new text to stdout as it comes."""
    return TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
