"""Models and tokenizers by name: a Hub id, a local folder, or the demo LM that comes with the package."""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig, TextStreamer

from attnpred.errors import UnsupportedModelError

DEMO_MODEL = Path(__file__).parents[1] / "assets" / "demo_lm"


def load_model(name: str, *, device: str | None = None, dtype: str | torch.dtype = "auto") -> tuple[Any, Any]:
    """Return (model, tokenizer) for a Hub id, a local folder, or `demo`, the embedded language model."""
    source = str(DEMO_MODEL) if name == "demo" else name
    where = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if name == "demo" and where == "cpu":
        dtype = torch.float32
    try:
        tokenizer = AutoTokenizer.from_pretrained(source)
        model: Any = AutoModelForCausalLM.from_pretrained(source, dtype=dtype)
    except (OSError, ValueError) as error:
        raise _no_model(name, error) from None
    return model.to(where).eval(), tokenizer


def load_config(name: str) -> tuple[PreTrainedConfig, torch.dtype]:
    """Return (config, dtype) of what `load_model(name)` would load, without its weights."""
    try:
        config: PreTrainedConfig = AutoConfig.from_pretrained(str(DEMO_MODEL) if name == "demo" else name)
    except (OSError, ValueError) as error:
        raise _no_model(name, error) from None
    dtype: Any = config.dtype or config.get_text_config(decoder=True).dtype or torch.float32
    return config, torch.float32 if name == "demo" and not torch.cuda.is_available() else dtype


def _no_model(name: str, error: Exception) -> UnsupportedModelError:
    first = str(error).strip().splitlines()[0]
    return UnsupportedModelError(f"got model {name!r}, expected a Hub id, a local folder or 'demo': {first}")


def text_streamer(tokenizer: Any) -> Any:
    """Return a streamer for `generate` that prints new text to stdout as it comes."""
    return TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
