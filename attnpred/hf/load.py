"""Models and tokenizers by name: a Hub id, a local folder, or the demo LM that comes with the package."""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, TextStreamer

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
        first = str(error).strip().splitlines()[0]
        raise UnsupportedModelError(
            f"got model {name!r}, expected a Hub id, a local folder or 'demo': {first}"
        ) from None
    return model.to(where).eval(), tokenizer


def text_streamer(tokenizer: Any) -> Any:
    """Return a streamer for `generate` that prints new text to stdout as it comes."""
    return TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
