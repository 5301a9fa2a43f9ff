"""Drawing a token from logits: greedy, or at a temperature, from the likeliest that hold a share of the probability."""

import secrets
from dataclasses import dataclass
from typing import NamedTuple, final

import torch
from torch import Tensor

from attnpred.checks import BYTES


@final
@dataclass(frozen=True, slots=True)
class Drawing:
    """temperature 0 is greedy; top_p: the share; seed: None is another one for every answer.

    alternatives: how many of the likeliest tokens are told beside each token; None tells no probabilities.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    seed: int | None = None
    alternatives: int | None = None


class Chance(NamedTuple):
    """A token and the logarithm of its probability, of the model's own distribution, whatever the temperature."""

    token: int
    logprob: float


class Drawn(NamedTuple):
    """A token; chance and alternatives where they are wanted, likeliest first."""

    token: int
    chance: Chance | None
    alternatives: tuple[Chance, ...]


@final
class Drawer:
    """Draws the tokens of one answer. row: its number among the answers to one prompt, which differ."""

    def __init__(self, drawing: Drawing, row: int = 0) -> None:
        self.drawing = drawing
        seed = secrets.randbelow(BYTES) if drawing.seed is None else (drawing.seed + row) % BYTES
        self._generator = torch.Generator("cpu").manual_seed(seed)

    def draw(self, logits: Tensor) -> Drawn:
        """Return the next token; logits [V]."""
        logits = logits.detach().float().cpu()
        token = int(logits.argmax()) if not self.drawing.temperature else self._sample(logits)
        if self.drawing.alternatives is None:
            return Drawn(token, None, ())
        logprobs = logits.log_softmax(0)
        values, tokens = logprobs.topk(min(self.drawing.alternatives, len(logprobs)))
        likeliest = map(Chance, tokens.tolist(), values.tolist())
        return Drawn(token, Chance(token, float(logprobs[token])), tuple(likeliest))

    def _sample(self, logits: Tensor) -> int:
        chances = (logits / self.drawing.temperature).softmax(0)
        if self.drawing.top_p < 1:
            ordered, tokens = chances.sort(descending=True)
            is_out = ordered.cumsum(0) - ordered >= self.drawing.top_p
            is_out[0] = False  # the share may be less than a number of 32 bits can say
            ordered = ordered.masked_fill(is_out, 0.0)
            return int(tokens[torch.multinomial(ordered, 1, generator=self._generator)])
        return int(torch.multinomial(chances, 1, generator=self._generator))
