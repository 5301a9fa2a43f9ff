"""Continue a text token by token with teacher-forced tokens, through the cache, and measure what each step costs.

Every step is a decode step of one token, so a sparse policy lives on the history that its own selections produced.
"""

import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Continuation:
    """Quality and cost of the steps: bits per byte of the text, median milliseconds of a step."""

    bits_per_byte: float
    ms_per_token: float


@torch.no_grad()
def continue_text(
    model: Any, tokenizer: Any, tokens: Tensor, context: int, cache: Any, on_step: Callable[[int], None] | None = None
) -> Continuation:
    """Read `tokens` [1, L] up to `context` in one pass, then one by one; `on_step` is called after each step, untimed."""
    tokens = tokens.to(model.device)
    logits = model(tokens[:, :context], cache=cache, use_cache=True, logits_to_keep=1).logits
    bits, times = 0.0, []
    for i in range(context, tokens.shape[1]):
        bits -= float(torch.log_softmax(logits[0, -1].float(), -1)[tokens[0, i]]) / math.log(2)
        if i + 1 < tokens.shape[1]:
            start = time.perf_counter()
            logits = model(tokens[:, i : i + 1], cache=cache, use_cache=True).logits
            times.append((time.perf_counter() - start) * 1e3)
            if on_step is not None:
                on_step(i)
    size = len(tokenizer.decode(tokens[0, context:]).encode())
    return Continuation(bits / size, statistics.median(times))
