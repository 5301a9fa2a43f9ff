"""One answer: `generate` on a cache, its text told as it comes, ended by the model, by a text, or by whoever listens."""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, final

import torch
from torch import Tensor

from attnpred.hf import TieredCache

Say = Callable[[str], None]
IsStopped = Callable[[], bool]


def never() -> bool:
    """Stop at nothing."""
    return False


@final
@dataclass(frozen=True, slots=True)
class Sampling:
    """How tokens are drawn: temperature 0 is greedy; every answer begins with `seed`."""

    new_tokens: int = 256
    temperature: float = 0.0
    seed: int = 0


@final
@dataclass(frozen=True, slots=True)
class Answer:
    """text, without what ended it; ids: all of it that belongs to the conversation, `closing` at its end included.

    first_seconds until the first token; ms_per_token: the median of those after it. is_whole: False where it was stopped, or
    cut off. stats: what its cache has counted so far.
    """

    text: str
    ids: list[int]
    closing: str
    is_whole: bool
    first_seconds: float
    ms_per_token: float
    stats: dict[str, Any]


def answer(
    model: Any,
    tokenizer: Any,
    cache: TieredCache,
    said: Sequence[int],
    sampling: Sampling,
    *,
    ends: Sequence[int],
    closing: str = "",
    say: Say,
    is_stopped: IsStopped = never,
) -> Answer:
    """Go on after `said`, of which `cache` holds the first tokens, until a token of `ends` or the text `closing`.

    say: gets the text as it comes. is_stopped: asked after each token.
    """
    ids = torch.tensor([said], device=model.device, dtype=torch.int64)
    listener = _Listener(tokenizer, ends, closing, say, is_stopped)
    is_drawn = sampling.temperature > 0
    with torch.random.fork_rng(enabled=is_drawn):
        if is_drawn:
            torch.manual_seed(sampling.seed)
        model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            cache=cache,
            max_new_tokens=sampling.new_tokens,
            do_sample=is_drawn,
            temperature=sampling.temperature if is_drawn else None,
            top_p=None,
            top_k=None,
            eos_token_id=list(ends) or None,
            pad_token_id=ends[0] if ends else 0,
            streamer=listener,
            stopping_criteria=[listener],
        )
    start, *moments = listener.moments
    waits = [1e3 * (later - earlier) for earlier, later in pairwise(moments)]
    return Answer(
        text=listener.said,
        ids=listener.ids,
        closing=closing if listener.is_closed else "",
        is_whole=listener.is_ended or listener.is_closed,
        first_seconds=moments[0] - start,
        ms_per_token=statistics.median(waits) if waits else 0.0,
        stats=cache.stats(),
    )


@final
class _Listener:
    """The streamer of one call of `generate`, and one of its stopping criteria."""

    def __init__(self, tokenizer: Any, ends: Sequence[int], closing: str, say: Say, is_stopped: IsStopped) -> None:
        self.tokenizer, self.ends, self.closing, self.say, self.is_stopped = tokenizer, ends, closing, say, is_stopped
        self.ids: list[int] = []
        self.said = ""
        self.is_ended = self.is_closed = False
        self.moments = [time.perf_counter()]

    def put(self, value: Tensor) -> None:
        """Take in one token; the prompt, which comes first, has two dimensions."""
        if value.ndim > 1:
            return
        self.moments.append(time.perf_counter())
        if int(value[0]) in self.ends:
            self.is_ended = True  # the next turn brings it along, and the cache has not got it yet
            return
        self.ids.append(int(value[0]))
        text = self._text()
        if not text.endswith("\ufffd"):  # part of a letter
            self._tell(text)

    def end(self) -> None:
        self._tell(self._text())

    def __call__(self, ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
        return torch.full((ids.shape[0],), self.is_closed or self.is_stopped(), device=ids.device, dtype=torch.bool)

    def _text(self) -> str:
        text: str = self.tokenizer.decode(self.ids, skip_special_tokens=True)
        text = text.lstrip()
        if not self.closing:
            return text
        text, mark, _ = text.partition(self.closing)
        self.is_closed = bool(mark)
        return text

    def _tell(self, text: str) -> None:
        new, self.said = text[len(self.said) :], text
        if new:
            self.say(new)
