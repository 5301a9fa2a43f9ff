"""Models and tokenizers by name: a Hub id, a local folder, a GGUF file, or a name of `attnpred models`."""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig, TextStreamer

from attnpred.errors import AttnpredError, UnsupportedModelError
from attnpred.hf import named_models
from attnpred.hf.config_border import check_config
from attnpred.hf.dtype import Chosen, choose_dtype, stored_dtype
from attnpred.hf.fetch import fetch_model
from attnpred.hf.gguf_file import config_of, converted, is_gguf
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

    device: left out, a GPU if there is one. dtype: auto, float32, bfloat16 or float16 (`attnpred.hf.dtype`). Raises as
    `source_of`, `ConfigError` for another dtype, and `UnsupportedModelError` for what cannot be loaded.
    """
    source, where = source_of(model), device or _usual_device()
    config, chosen = _config(model, source, where, dtype)
    try:
        tokenizer = AutoTokenizer.from_pretrained(source)
        loaded: Any = AutoModelForCausalLM.from_pretrained(source, config=config, dtype=chosen.dtype)
    except Exception as error:  # files of anyone's making, read by code of every family: it may be any
        raise _no_model(model, error) from error
    return loaded.to(where).eval(), tokenizer


def load_config(
    model: str, *, device: str | None = None, dtype: str | torch.dtype = "auto"
) -> tuple[PreTrainedConfig, Chosen]:
    """Return (config, dtype and why) of what `load_model` with the same arguments would load, without its weights."""
    where = device or _usual_device()
    if is_gguf(model):
        config = config_of(Path(model).expanduser())
        return config, choose_dtype(config, where, dtype)
    return _config(model, source_of(model), where, dtype)


def _config(model: str, source: str, device: str, dtype: str | torch.dtype) -> tuple[PreTrainedConfig, Chosen]:
    try:
        check_config(source)
        config: PreTrainedConfig = AutoConfig.from_pretrained(source)
        text: Any = config.get_text_config(decoder=True)
        stored: Any = stored_dtype(config)
        if not isinstance(text, PreTrainedConfig) or not isinstance(stored, torch.dtype):
            raise TypeError(f"its config has {text if isinstance(stored, torch.dtype) else stored!r} inside")
        if model == "demo" and dtype == "auto" and device == "cpu":
            return config, Chosen(torch.float32, "the demo model's figures were measured so")
        return config, choose_dtype(config, device, dtype)
    except AttnpredError:
        raise
    except Exception as error:  # as above
        raise _no_model(model, error) from error


def _usual_device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def _no_model(model: str, error: Exception) -> UnsupportedModelError:
    first = next(iter(str(error).strip().splitlines()), "") or type(error).__name__
    return UnsupportedModelError(
        f"got model {model!r}, expected a Hub id, a local folder, a GGUF file or a name of `attnpred models`: {first}"
    )


def text_streamer(tokenizer: Any) -> Any:
    """Return a streamer for `generate` that prints new text to stdout as it comes."""
    return TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
